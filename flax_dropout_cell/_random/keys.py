"""Keys: how one is checked and typed, and which one a draw is made from."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .threefry import threefry_2x32


def check_rng(rng: Any) -> None:
    """Refuses what is neither one key, typed or raw, nor None."""
    if rng is None:
        return
    dtype, shape = getattr(rng, "dtype", None), getattr(rng, "shape", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        is_key = shape == ()
    else:
        is_key = dtype == jnp.uint32 and shape in ((2,), (4,))
    if not is_key:
        what = f"{dtype}{list(shape)}" if shape is not None else repr(rng)
        raise TypeError(
            f"rng must be one key, such as jax.random.key(0), or None for evaluation; got {what}."
        )


def as_typed(rng: jax.Array) -> jax.Array:
    """Types a raw key. To be done outside of a `jit`, which forgets which PRNG is the default."""
    return rng if is_typed(rng) else jax.random.wrap_key_data(rng)


def is_typed(rng: jax.Array) -> bool:
    return jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)


def is_threefry(rng: jax.Array) -> bool:
    return jax.random.key_impl(rng) == "threefry2x32"


def fold_in(rng: jax.Array, data: int | np.integer | jax.Array) -> jax.Array:
    """Gives `jax.random.fold_in(rng, data)`, bit for bit."""
    if not is_threefry(rng):
        return jax.random.fold_in(rng, data)
    folded = _fold_in(as_typed(rng), jnp.uint32(data))
    return folded if is_typed(rng) else jax.random.key_data(folded)


@jax.jit
def _fold_in(rng: jax.Array, data: jax.Array) -> jax.Array:
    # On every platform: a branch for each, as above, does not differentiate in JAX 0.7 and 0.8.
    folded = jnp.stack(threefry_2x32(jax.random.key_data(rng), data))
    return jax.random.wrap_key_data(folded, impl="threefry2x32")
