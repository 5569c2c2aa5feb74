"""Dropout around a recurrent layer: embeddings, Monte Carlo, regularization."""
