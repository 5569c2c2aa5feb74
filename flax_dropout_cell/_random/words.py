"""`jax.random.bits` and `jax.random.fold_in`, the same bits at a fraction of their price on CPU.

There, JAX compiles threefry to a loop over its rounds: many passes over memory for an array, and
a dozen little kernels for a key. Here the rounds are written out, so that they become one kernel.
Other PRNGs have JAX's own code, and so have the words on other platforms.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from .keys import is_threefry
from .threefry import threefry_2x32


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
        words = jnp.bitwise_xor(*threefry_2x32(jax.random.key_data(rng), _flat_indices(shape)))
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

    if not (is_threefry(rng) and jax.config.jax_threefry_partitionable and _is_counted(shape)):  # type: ignore
        return with_jax(rng)
    return jax.lax.platform_dependent(rng, cpu=on_cpu, default=with_jax)


def _is_counted(shape: tuple[int, ...]) -> bool:
    """Whether 32 bits number a shape's elements; a symbolic shape is left to JAX."""
    return all(isinstance(dim, int) for dim in shape) and math.prod(shape) < 2**32


def _flat_indices(shape: tuple[int, ...]) -> jax.Array:
    """Each element's place in the flattened array; as a sum of iotas it shards along any dim."""
    indices = jnp.zeros(shape, jnp.uint32)
    for dim in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[dim + 1 :]))
        indices += stride * jax.lax.broadcasted_iota(jnp.uint32, shape, dim)
    return indices
