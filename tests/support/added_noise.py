"""A noise whose mask has the dtype of its value."""

import dataclasses
from typing import Any

import jax

import flax_dropout_cell as fdc


@fdc.register_noise
@dataclasses.dataclass(frozen=True)
class Added:
    """Noise that is drawn in the dtype of the value, and refuses any other."""

    stddev: Any = 1.0
    variational: bool = True
    reparameterized: bool = False

    def draw_mask(self, rng: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.normal(rng, shape, dtype)

    def apply(self, mask: jax.Array, value: jax.Array, previous: Any) -> jax.Array:
        del previous
        return value + self.stddev * mask

    def expected(self, value: jax.Array, previous: Any) -> jax.Array:
        del previous
        return value
