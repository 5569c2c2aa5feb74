"""Stores Keras' layers and their outputs for `tests/cells/test_weights_from_elsewhere.py`.

Needs `pip install keras torch`; run it by hand, never in CI:

    python tests/support/parity/make_keras_weights.py
"""
# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false

import os
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # Not where pytest imports every file to look for doctests.
    os.environ["KERAS_BACKEND"] = "torch"

    import keras
    import torch

STEPS, BATCH, FEATURES, UNITS = 5, 2, 3, 4


def store(name: str, layer: "keras.layers.Layer", draw: np.random.Generator) -> None:
    """A layer's weights, a sequence from a state of zeros, and its inputs' gradient."""
    xs = torch.tensor(draw.normal(size=(STEPS, BATCH, FEATURES)), dtype=torch.float32)
    xs.requires_grad = True
    layer.build((BATCH, STEPS, FEATURES))
    weights = [
        (weight + draw.normal(size=weight.shape)).astype(np.float32)
        for weight in layer.get_weights()
    ]
    layer.set_weights(weights)
    ys = layer(xs.swapaxes(0, 1)).swapaxes(0, 1)
    (gradient,) = torch.autograd.grad((ys**2).sum(), xs)
    arrays = {f"weight_{index}": weight for index, weight in enumerate(weights)}
    for key, value in {"xs": xs, "ys": ys, "gradient": gradient}.items():
        arrays[key] = value.detach().numpy()
    np.savez_compressed(Path(__file__).with_name(f"weights_keras_{name}.npz"), **arrays)


if __name__ == "__main__":
    generator = np.random.default_rng(0)
    store("lstm", keras.layers.LSTM(UNITS, return_sequences=True), generator)
    store("gru", keras.layers.GRU(UNITS, return_sequences=True), generator)
