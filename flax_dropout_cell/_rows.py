"""Rows of a batch by name: what their masks depend on where it is not their place."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._random.keys import fold_in, is_threefry
from .noises.protocol import Noise


class Rows(NamedTuple):
    """Two words `[*batch]` that name each row; equal names draw equal masks."""

    first: jax.Array
    second: jax.Array

    @property
    def batch(self) -> tuple[int, ...]:
        """The batch dims."""
        return self.first.shape


def rows_by_id(ids: jax.Array) -> Rows:
    """Names rows by integers, the same for every integer type."""
    bits = jnp.iinfo(ids.dtype).bits
    high = ids >> (32 if bits == 64 else bits - 1)
    if bits < 64 and jnp.issubdtype(ids.dtype, jnp.unsignedinteger):
        high = jnp.zeros_like(ids)
    return Rows(ids.astype(jnp.uint32), high.astype(jnp.uint32))


def rows_by_start(steps: jax.Array) -> Rows:
    """Names rows by the step at which their sequence starts, and their place."""
    places = jnp.arange(math.prod(steps.shape), dtype=jnp.uint32).reshape(steps.shape)
    return Rows(steps.astype(jnp.uint32), places)


def draws_by_row(site: str, noise: Noise, shape: tuple[int, ...], batch_ndim: int) -> bool:
    """Whether rows have masks of their own: weights and masks shared over the batch do not."""
    dims = getattr(noise, "broadcast_dims", ())
    return site != "params" and not any(dim % len(shape) < batch_ndim for dim in dims)


def draw_rows(
    noise: Noise, rng: jax.Array, shape: tuple[int, ...], dtype: Any, rows: Rows
) -> jax.Array:
    """Draws each row's mask from the row's own key."""
    batch_ndim = len(rows.batch)
    dims = getattr(noise, "broadcast_dims", ())
    if dims:
        inner = tuple(dim % len(shape) - batch_ndim for dim in dims)
        noise = dataclasses.replace(noise, broadcast_dims=inner)  # type: ignore[type-var]

    def draw_row(row: Rows) -> jax.Array:
        row_rng = fold_in(fold_in(rng, row.first), row.second)
        return noise.draw_mask(row_rng, shape[batch_ndim:], dtype)

    flat = jax.tree.map(lambda words: words.reshape(math.prod(rows.batch)), rows)
    # JAX's rbg gives all rows of a vmap the bits of the first key.
    masks = jax.vmap(draw_row)(flat) if is_threefry(rng) else jax.lax.map(draw_row, flat)
    return masks.reshape(rows.batch + masks.shape[1:])
