"""`jax.random.bits` and `jax.random.fold_in`, the same bits at a fraction of their price on CPU.

There, JAX compiles threefry to a loop over its rounds: many passes over memory for an array, and
a dozen little kernels for a key. Here the rounds are written out, so that they become one kernel.
Other PRNGs have JAX's own code, and so have the words on other platforms.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def draw_words(
    rng: jax.Array,
    shape: tuple[int, ...],
    finish: Callable[[jax.Array], jax.Array] = lambda words: words,
) -> jax.Array:
    """Gives `finish(jax.random.bits(rng, shape, jnp.uint32))`, bit for bit.

    Args:
      rng: a typed key.
      shape: the shape of the words.
      finish: what to do with each of them, elementwise and once.

    Returns:
      A uint32 array of shape `shape`.
    """

    def with_jax(rng: jax.Array) -> jax.Array:
        return finish(jax.random.bits(rng, shape, jnp.uint32))

    def written_out(rng: jax.Array) -> jax.Array:
        words = jnp.bitwise_xor(*_threefry_2x32(jax.random.key_data(rng), _flat_indices(shape)))
        return finish(words)

    def never(rng: jax.Array) -> jax.Array:
        return jnp.full(shape, jax.random.key_data(rng)[0])

    def on_cpu(rng: jax.Array) -> jax.Array:
        # XLA merges the words into what reads them, and would compute a word afresh for each of
        # the units that are cut from it. It merges nothing over the border of a branch. This one
        # is always taken, for no square is 2 mod 4, but XLA cannot tell.
        number = jax.random.key_data(rng)[0]
        always = (number * number) & jnp.uint32(3) != jnp.uint32(2)
        return jax.lax.cond(always, written_out, never, rng)

    partitionable = jax.config.jax_threefry_partitionable  # type: ignore
    if not (_is_threefry(rng) and partitionable and math.prod(shape) < 2**32):
        return with_jax(rng)
    return jax.lax.platform_dependent(rng, cpu=on_cpu, default=with_jax)


def fold_in(rng: jax.Array, data: int | np.integer | jax.Array) -> jax.Array:
    """Gives `jax.random.fold_in(rng, data)`, bit for bit."""
    if not _is_threefry(rng):
        return jax.random.fold_in(rng, data)
    folded = _fold_in(as_typed(rng), jnp.uint32(data))
    return folded if _is_typed(rng) else jax.random.key_data(folded)


@jax.jit
def _fold_in(rng: jax.Array, data: jax.Array) -> jax.Array:
    # On every platform: a branch for each, as above, does not differentiate in JAX 0.7 and 0.8.
    folded = jnp.stack(_threefry_2x32(jax.random.key_data(rng), data))
    return jax.random.wrap_key_data(folded, impl="threefry2x32")


def as_typed(rng: jax.Array) -> jax.Array:
    """Types a raw key. To be done outside of a `jit`, which forgets which PRNG is the default."""
    return rng if _is_typed(rng) else jax.random.wrap_key_data(rng)


def _is_typed(rng: jax.Array) -> bool:
    return jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)


def _is_threefry(rng: jax.Array) -> bool:
    return jax.random.key_impl(rng) == "threefry2x32"


def _flat_indices(shape: tuple[int, ...]) -> jax.Array:
    """Each element's place in the flattened array; as a sum of iotas it shards along any dim."""
    indices = jnp.zeros(shape, jnp.uint32)
    for dim in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[dim + 1 :]))
        indices += stride * jax.lax.broadcasted_iota(jnp.uint32, shape, dim)
    return indices


def _threefry_2x32(key: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011) of the blocks `(0, counts)`."""
    keys = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    left, right = jnp.full_like(counts, keys[0]), counts + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            left += right
            right = (right << jnp.uint32(rotation)) | (right >> jnp.uint32(32 - rotation))
            right ^= left
        left += keys[(group + 1) % 3]
        right += keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return left, right
