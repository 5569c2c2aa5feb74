"""An LSTM that computes with small integers, so sums are exact in whatever order they are taken.

XLA picks a kernel for a matrix product by its shape and by the CPU, and each kernel rounds in its
own way. Tests that compare programs of several shapes bit for bit use this LSTM, with integers for
weights and inputs, and noises that do not scale, or by a power of two.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flax_dropout_cell as fdc
from flax_dropout_cell.cells.lstm import lstm_step


def gate(x: jax.Array) -> jax.Array:
    return (x > 0).astype(x.dtype)


def activation(x: jax.Array) -> jax.Array:
    return jnp.clip(x, -8, 8)


FUNCTIONS: dict[str, Any] = {"gate_fn": gate, "activation_fn": activation}
"""For the cells of linen and NNX."""


def lstm_cell(params: Any, carry: Any, x: jax.Array, *, disturb: Any = fdc.undisturbed) -> Any:
    return lstm_step(params, carry, x, disturb, **FUNCTIONS)


def integers(draw: np.random.Generator, *shape: int) -> np.ndarray:
    return draw.integers(-2, 3, shape).astype(np.float32)
