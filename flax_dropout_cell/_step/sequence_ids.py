"""The ids of sequences: a row's masks then follow its id, not its place in the batch."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class SequenceIds(NamedTuple):
    """The id of each row as two 32-bit words, `[*batch]` each; equal ids draw equal masks."""

    low: jax.Array
    high: jax.Array

    @property
    def batch(self) -> tuple[int, ...]:
        """The batch dims."""
        return self.low.shape


def split_words(ids: jax.Array | np.ndarray) -> SequenceIds:
    """Integer ids as words; an id gives the same words in every integer type."""
    # The upper word is that of the id as a 64-bit integer: the sign of a signed one, else 0.
    bits = jnp.iinfo(ids.dtype).bits
    high = ids >> (32 if bits == 64 else bits - 1)
    if bits < 64 and jnp.issubdtype(ids.dtype, jnp.unsignedinteger):
        high = high >> 1
    return SequenceIds(jnp.asarray(ids.astype(jnp.uint32)), jnp.asarray(high.astype(jnp.uint32)))


def ids_from_starts(steps: jax.Array) -> SequenceIds:
    """Ids for sequences that were given none: the step at which each starts, and its row's number.

    Args:
      steps: ints `[time, *batch]`.
    """
    numbers = jnp.arange(math.prod(steps.shape[1:]), dtype=jnp.uint32).reshape(steps.shape[1:])
    return SequenceIds(steps.astype(jnp.uint32), jnp.broadcast_to(numbers, steps.shape))
