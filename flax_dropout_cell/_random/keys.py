"""Keys: how one is checked and typed, and which one a draw is made from.

A draw's key depends on the sequence's key, the step, the site and the leaf, and on nothing else:

    step t                  fold_in(rng, t), with t below 2**31
    site s, leaf i          fold_in(step or sequence key, 2**31 + s * 2**28 + i)
    site inside, leaf i     the same for the slot `inside` and leaf 0, then the name, then i
    word types              fold_in(rng, EMBEDDING)
    wrapper of d wrappers   fold_in(rng, 2**31 + 7 * 2**28 + d) for its rng, if d > 0
    a wrapper's cell        fold_in(rng, CELL) for its rng, if the cell draws too
"""

import functools
import hashlib
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from .._messages import must_be
from .threefry import threefry_2x32

# Steps stay below the first site, so a mask for the sequence never shares a key with one for a
# step. The order is part of the random stream.
_FIRST_SITE = 2**31
# Two uses of one constant, which never meet: word types draw from this key itself or with a row
# folded in, and a wrapped cell only from keys that are folded from it.
EMBEDDING = CELL = np.uint32(2**32 - 1)
_SITES = ("params", "input", "state", "output", "inside")
_NESTED = 7  # the last slot
_ONE_KEY = "one key, such as jax.random.key(0)"


def leaf_rng(rng: jax.Array, site: str, index: int, *, inside: str | None = None) -> jax.Array:
    """The key of one leaf's mask at a site; `inside` names a site that the cell has."""
    slot = _FIRST_SITE + _SITES.index(site) * 2**28
    if inside is None:
        return fold_in(rng, np.uint32(slot + index))
    named = fold_in(fold_in(rng, np.uint32(slot)), np.uint32(name_hash(inside)))
    return fold_in(named, np.uint32(index))


@functools.cache
def name_hash(name: str) -> int:
    """The number of a site inside a cell: a hash of its name, the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def nested_rng(rng: jax.Array, depth: int) -> jax.Array:
    """A wrapper's own key: nested ones are given the same `rng`, so their number goes into it."""
    return rng if depth == 0 else fold_in(rng, np.uint32(_FIRST_SITE + _NESTED * 2**28 + depth))


def cell_rng(rng: jax.Array) -> jax.Array:
    """The key for a wrapper's cell, if the wrapper itself draws from `rng`."""
    return fold_in(as_key("rng", rng), CELL)


def step_rng(rng: jax.Array, step: int | np.integer | jax.Array) -> jax.Array:
    """The key of a step: `jax.random.split(rng, T)[step]`, if the PRNG is partitionable."""
    return fold_in(rng, jnp.asarray(step).astype(jnp.uint32))


def as_rng(rng: Any) -> jax.Array | None:
    """Checks a key and gives it a type; None stays None.

    Call it outside of `jit`: a raw key inside a jitted function no longer knows the default PRNG.

    Raises:
      TypeError: if it is neither one key, typed or raw, nor None.
    """
    return None if rng is None else as_key("rng", rng, f"{_ONE_KEY}, or None")


def need_rng(caller: str, rng: Any) -> jax.Array:
    """The key, with a type; raises if it is None or not a key."""
    if rng is None:
        raise ValueError(f"{caller} needs a key such as jax.random.key(0), got rng=None.")
    return as_key("rng", rng)


def as_key(name: str, key: Any, wanted: str = _ONE_KEY) -> jax.Array:
    """One key, with a type; the error says what was `wanted`."""
    if not isinstance(key, jax.Array | np.ndarray):
        raise TypeError(must_be(name, wanted, key))
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        is_key = key.shape == ()
    else:
        is_key = key.dtype == jnp.uint32 and key.shape in ((2,), (4,))
    if not is_key:
        raise TypeError(must_be(name, wanted, key))
    return as_typed(cast(jax.Array, key))


def as_typed(rng: jax.Array) -> jax.Array:
    """Types a raw key, as one of the default PRNG."""
    if is_typed(rng):
        return rng
    try:
        return jax.random.wrap_key_data(rng)
    except TypeError:
        raise TypeError(
            f"a raw key of {rng.shape[-1]} words is not one of {jax.config.jax_default_prng_impl}, "
            f"the default PRNG: write jax.random.wrap_key_data(key, impl=..)."
        ) from None


def is_typed(rng: jax.Array) -> bool:
    """Whether a key knows its PRNG."""
    return jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)


def is_threefry(rng: jax.Array) -> bool:
    """Whether a key is one of threefry2x32, whatever `jax_default_prng_impl` says."""
    return jax.random.key_impl(rng) == "threefry2x32"


def fold_in(rng: jax.Array, data: int | np.integer | jax.Array) -> jax.Array:
    """`jax.random.fold_in(rng, data)`, bit for bit."""
    if not is_threefry(rng):
        return jax.random.fold_in(rng, data)
    folded = _fold_in(as_typed(rng), jnp.uint32(data))
    return folded if is_typed(rng) else jax.random.key_data(folded)


@jax.jit
def _fold_in(rng: jax.Array, data: jax.Array) -> jax.Array:
    # The same code on every platform: `platform_dependent`, as in `draw_words`, cannot be
    # differentiated in JAX 0.7 and 0.8.
    folded = jnp.stack(threefry_2x32(jax.random.key_data(rng), data))
    return jax.random.wrap_key_data(folded, impl="threefry2x32")
