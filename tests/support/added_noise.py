"""A noise whose mask has the dtype of its value."""

import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Added:
    """Noise that is drawn in the dtype of the value, and refuses any other."""

    variational: bool = True

    def draw_mask(self, rng: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.normal(rng, shape, dtype)

    def apply(self, mask: jax.Array, value: jax.Array, previous: Any) -> jax.Array:
        del previous
        return value + mask

    def expected(self, value: jax.Array, previous: Any) -> jax.Array:
        del previous
        return value
