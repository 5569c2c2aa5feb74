"""A PRNG that compiles in no time, for tests that ask where masks come from, not how random."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl

_ODD = 0x9E3779B9


def _mix(words: jax.Array) -> jax.Array:
    """The end of MurmurHash3."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)


def _hash(key: jax.Array, numbers: jax.Array) -> jax.Array:
    first, second = (half.reshape((1,) * numbers.ndim) for half in (key[0], key[1]))
    return _mix(_mix(numbers * jnp.uint32(_ODD) + first) ^ second)


def _fold_in(key: jax.Array, data: Any) -> jax.Array:
    return _hash(key, jnp.stack([2 * data, 2 * data + jnp.uint32(1)]))


def _split(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    numbers = jnp.arange(2 * math.prod(shape), dtype=jnp.uint32)
    return _hash(key, numbers).reshape(*shape, 2)


def _random_bits(key: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    numbers = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    return _hash(key, numbers).astype(f"uint{bit_width}")


def _seed(seed: Any) -> jax.Array:
    return _fold_in(jnp.zeros(2, jnp.uint32), jnp.asarray(seed).astype(jnp.uint32))


QUICK = define_prng_impl(
    key_shape=(2,), seed=_seed, split=_split, random_bits=_random_bits, fold_in=_fold_in,
    name="quick", tag="quick",
)  # fmt: skip
"""For `jax.random.key(seed, impl=QUICK)`."""


def quick_key(seed: int) -> jax.Array:
    """A key of the quick PRNG."""
    return jax.random.key(seed, impl=QUICK)
