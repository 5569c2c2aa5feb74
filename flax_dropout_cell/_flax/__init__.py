"""Shared by `linen` and `nnx`: the adapter of a framework, the layer and the wrappers."""
