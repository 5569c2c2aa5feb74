"""The bits of `jax.random.bits`, at a fraction of the cost on a CPU.

On a CPU, JAX compiles threefry to a loop over its rounds: many passes over memory. Here the
rounds are written out, so XLA makes one kernel of them. Other PRNGs and other platforms use JAX's
own code.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from .._compat import vary_over, varying_axes
from .keys import is_threefry
from .threefry import threefry_2x32


def draw_words(
    rng: jax.Array,
    shape: tuple[int, ...],
    finish: Callable[..., jax.Array] = lambda words: words,
    *operands: jax.Array,
) -> jax.Array:
    """`finish(jax.random.bits(rng, shape, jnp.uint32), *operands)`, bit for bit.

    Args:
      rng: a typed key.
      shape: the shape of the words.
      finish: an elementwise function that is applied to each word once.
      operands: arrays that `finish` takes after the words.

    Returns:
      A uint32 array of shape `shape`.
    """

    def with_jax(rng: jax.Array, *operands: jax.Array) -> jax.Array:
        return finish(jax.random.bits(rng, shape, jnp.uint32), *operands)

    def on_cpu(rng: jax.Array, *operands: jax.Array) -> jax.Array:
        return _in_own_kernel(shape, finish)(jax.random.key_data(rng), *operands)

    if not (is_threefry(rng) and jax.config.jax_threefry_partitionable and _is_counted(shape)):  # type: ignore
        return with_jax(rng, *operands)
    # Decided when a program is lowered, so a program that is exported for a GPU has JAX's code.
    return jax.lax.platform_dependent(rng, *operands, cpu=on_cpu, default=with_jax)


def _in_own_kernel(
    shape: tuple[int, ...], finish: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
    """The words of keys `[*many, 2]`, `[*many, *shape]`, finished, in a kernel of their own.

    XLA fuses the words into their readers, and would compute a word again for each of the units
    that are cut from it. It does not fuse across a branch. This branch is always taken, because no
    square is 2 mod 4, but XLA cannot tell. Under `jax.vmap` it is still one branch for all keys.
    """

    def words_of(keys: jax.Array, *operands: jax.Array) -> jax.Array:
        many = keys.shape[:-1]
        counts = _flat_indices(shape).reshape((1,) * len(many) + shape)
        left, right = threefry_2x32(keys.reshape(*many, *(1,) * len(shape), 2), counts)
        return finish(left ^ right, *operands)

    def never(keys: jax.Array, *operands: jax.Array) -> jax.Array:
        # In jax.shard_map both branches must differ over the same axes.
        axes = frozenset[str]().union(*(varying_axes(jax.typeof(each)) for each in operands))
        return vary_over(jnp.full((*keys.shape[:-1], *shape), keys.reshape(-1)[0]), axes)

    @jax.custom_batching.custom_vmap
    def draw(keys: jax.Array, *operands: jax.Array) -> jax.Array:
        number = keys.reshape(-1)[0]
        always = (number * number) & jnp.uint32(3) != jnp.uint32(2)
        return jax.lax.cond(always, words_of, never, keys, *operands)

    @draw.def_vmap
    def draw_many(
        size: int, batched: list[bool], keys: jax.Array, *operands: jax.Array
    ) -> tuple[jax.Array, bool]:
        del size
        if any(batched[1:]) or not keys.size:
            axes = [0 if each else None for each in batched]
            return jax.vmap(words_of, axes)(keys, *operands), True
        return draw(keys, *operands), True

    return draw


def _is_counted(shape: tuple[int, ...]) -> bool:
    """Whether 32 bits can number a shape's elements; a symbolic shape is left to JAX."""
    return all(isinstance(dim, int) for dim in shape) and math.prod(shape) < 2**32


def _flat_indices(shape: tuple[int, ...]) -> jax.Array:
    """Each element's index in the flattened array; as a sum of iotas, sharded along any dim."""
    indices = jnp.zeros(shape, jnp.uint32)
    for dim in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[dim + 1 :]))
        indices += stride * jax.lax.broadcasted_iota(jnp.uint32, shape, dim)
    return indices
