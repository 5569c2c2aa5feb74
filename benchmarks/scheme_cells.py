"""The recurrent layers in which `schemes.py` compares schemes, under the name of their cell."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import flax_dropout_cell as fdc


class Layers(NamedTuple):
    """A stack of layers of one cell.

    Attributes:
      init: `init(rng, in_features, features)`, the weights of one layer.
      cell: as `dropout_scan` takes it.
      first_carry: `first_carry(rows, features)`.
      count: the number of layers.
    """

    init: Callable[..., Any]
    cell: Callable[..., Any]
    first_carry: Callable[[int, int], Any]
    count: int = 1


def zeros(rows: int, features: int) -> jax.Array:
    return jnp.zeros((rows, features))


def lstm_zeros(rows: int, features: int) -> fdc.LSTMState:
    return fdc.LSTMState(zeros(rows, features), zeros(rows, features))


def complex_zeros(rows: int, features: int) -> jax.Array:
    return jnp.zeros((rows, features), jnp.complex64)


def with_gelu(cell: Callable[..., Any]) -> Callable[..., Any]:
    """A linear cell whose outputs pass a GELU, for its state mixes nothing over time."""

    def run(
        params: Any, carry: Any, x: Any, *, disturb: Callable[..., Any] = fdc.undisturbed
    ) -> Any:
        carry, y = cell(params, carry, x, disturb=disturb)
        return carry, jax.nn.gelu(y)

    return run


# One layer of a linear cell cannot tell in which order its inputs came, except by decay.
CELLS = {
    "lstm": Layers(fdc.init_lstm, fdc.lstm_cell, lstm_zeros),
    "gru": Layers(fdc.init_gru, fdc.gru_cell, zeros),
    "lru": Layers(fdc.init_lru, with_gelu(fdc.lru_cell), complex_zeros, count=2),
    "min_gru": Layers(fdc.init_min_gru, with_gelu(fdc.min_gru_cell), zeros, count=2),
}
