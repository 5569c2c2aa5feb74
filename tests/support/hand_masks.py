"""Masks of `Dropout(keep_prob=0.5)` by hand: from `jax.random`, with the keys of randomness.md."""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SITES = ("params", "input", "state", "output", "inside")


def site_key(
    key: jax.Array, site: str, step: int | None = None, leaf: int = 0, *, inside: str = ""
) -> jax.Array:
    """The key of a mask at a site, for the sequence or for a step; `inside` is a site's name."""
    key = key if step is None else jax.random.fold_in(key, step)
    slot = 2**31 + SITES.index(site) * 2**28
    if site != "inside":
        return jax.random.fold_in(key, np.uint32(slot + leaf))
    digest = int.from_bytes(hashlib.sha256(inside.encode()).digest()[:4], "big")
    for number in (slot, digest, leaf):
        key = jax.random.fold_in(key, np.uint32(number))
    return key


def kept(key: jax.Array, *shape: int) -> np.ndarray:
    """A word for each row, and a bit of it for each of its units, 32 at most: 0 keeps it."""
    *batch, units = shape
    words = np.asarray(jax.random.bits(key, (*batch, 1), jnp.uint32))
    return (words >> np.arange(units, dtype=np.uint32)) & 1 == 0


def with_number(key: jax.Array, number: int) -> jax.Array:
    """A number of 64 bits in a key: its lower 32 bits, then its upper ones."""
    low, high = np.uint32(number % 2**32), np.uint32((number >> 32) % 2**32)
    return jax.random.fold_in(jax.random.fold_in(key, low), high)


def with_seed(key: jax.Array, seed: int | None) -> jax.Array:
    """TensorFlow's seed in a key."""
    return key if seed is None else with_number(key, seed)


def lstm_row(run: Callable[..., Any], params: Any, key: jax.Array, xs: jax.Array) -> np.ndarray:
    """An LSTM over one row `[time, features]`: frozen masks on weights and h, fresh ones on x.

    Args:
      run: the bare cell, `run(params, (c, h), x) -> ((c, h), y)`.
      params: its weights.
      key: the key of the sequence.
      xs: the row.
    """

    def dropped(mask: np.ndarray, value: Any) -> jax.Array:
        return jnp.where(mask, 2 * value, 0)

    leaves, structure = jax.tree.flatten(params)
    weights = jax.tree.unflatten(
        structure,
        [
            dropped(kept(site_key(key, "params", leaf=i), *leaf.shape), leaf)
            for i, leaf in enumerate(leaves)
        ],
    )
    units, ys = leaves[-1].shape[-1], []
    c = h = jnp.zeros(units)
    for t, x in enumerate(xs):
        x = dropped(kept(site_key(key, "input", t), *x.shape), x)
        (c, h), y = run(weights, (c, h), x)
        h = dropped(kept(site_key(key, "state", leaf=1), units), h)
        ys.append(y)
    return np.stack(ys)
