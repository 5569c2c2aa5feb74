"""Padding: steps that are not a row's own, and the inputs that replace them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from .._arguments import as_ints
from .._messages import short_repr
from .._sharding import place_like
from .._spec.prefixes import PyTree


def find_valid(seq_lengths: Any, valid: Any, steps: int) -> jax.Array | None:
    """Bools `[time, *batch]`, False at padding; None if there is no padding.

    Args:
      seq_lengths: ints `[*batch]`, or None.
      valid: bools `[time, *batch]`, or None.
      steps: the number of steps.
    """
    if valid is None:
        if seq_lengths is None:
            return None
        lengths = check_lengths(seq_lengths, steps)
        indices = jnp.arange(steps, dtype=jnp.int32)
        return jnp.less(indices.reshape(steps, *[1] * lengths.ndim), lengths[None])
    if seq_lengths is not None:
        raise ValueError("give seq_lengths or valid, not both: valid alone is enough.")
    return check_bools("valid", valid, steps)


def check_lengths(seq_lengths: Any, steps: int) -> jax.Array:
    """The lengths as int32, none longer than the inputs.

    Raises if a length on the host is out of range. On the device such a length is clipped: a check
    would have to wait for the device.
    """
    if np.dtype(bool) == getattr(seq_lengths, "dtype", None):
        raise TypeError("seq_lengths must be ints, got bool: pass a mask as valid=.")
    lengths = as_ints("seq_lengths", seq_lengths)
    if isinstance(lengths, np.ndarray) and isinstance(steps, int):
        wrong = lengths[(lengths < 0) | (lengths > steps)]
        if wrong.size:
            raise ValueError(f"seq_lengths must be from 0 to {steps}, the steps, got {wrong[0]}.")
    lengths = jnp.asarray(lengths)  # from NumPy only now, for JAX would cut int64 before the check
    if lengths.dtype.itemsize < 4:  # a uint8 cannot hold 300 steps
        lengths = lengths.astype(jnp.int32)
    return jnp.clip(lengths, 0, steps).astype(jnp.int32)


def check_bools(name: str, value: Any, steps: int) -> jax.Array:
    """Raises if a value is not bools `[time, *batch]`."""
    value = jnp.asarray(value)
    if value.dtype != bool:
        raise TypeError(f"{name} must be bools [time, *batch], got {value.dtype}.")
    if value.shape[:1] != (steps,):
        raise ValueError(f"{name} must be [time, *batch] with {steps} steps, got {value.shape}.")
    return value


def check_rows(name: str, tree: PyTree, batch: tuple[int, ...], of: str) -> None:
    """Raises if a leaf with at least as many dims as the batch does not start with the batch dims.

    A leaf has rows if it has enough dims. Its sizes must not decide: a leaf that all rows share
    would lose values in a batch that happens to have its size.
    """
    for path, leaf in tree_leaves_with_path(tree):
        if len(batch) <= np.ndim(leaf) and np.shape(leaf)[: len(batch)] != batch:
            raise ValueError(
                f"{name}{keystr(path)} is {short_repr(leaf)} at a step, which does not start with "
                f"the batch dims of {of}, {batch}. If rows share it, use jnp.broadcast_to."
            )


def stand_ins(xs: PyTree, valid: jax.Array) -> PyTree:
    """The inputs that replace padding: each row's first valid input.

    The results at padding are thrown away, but their gradient is 0 times the derivative there: a
    NaN in the padding would make it NaN, and so would zeros in a norm, a root or a logarithm. For
    the same reason a row without a valid step reads ones.
    """
    steps, ndim = valid.shape[0], valid.ndim - 1

    def stand_in(leaf: jax.Array) -> jax.Array:
        if leaf.ndim <= ndim:  # one value for all rows, which has no padding
            return leaf[0]
        first = jnp.argmax(valid, 0).reshape(1, *valid.shape[1:], *[1] * (leaf.ndim - ndim - 1))
        row = jnp.take_along_axis(leaf, first, 0)[0]
        return jax.lax.stop_gradient(select_rows(valid.any(0), row, jnp.ones_like(row)))

    if steps == 0:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), xs)
    return jax.tree.map(stand_in, xs)


def keep_rows(keep: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` in the rows to keep, and in every leaf without rows; `old` in all others."""
    return jax.tree.map(
        lambda new, old: new if new.ndim < keep.ndim else select_rows(keep, new, old), new, old
    )


def select_rows(where: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """`new` in the rows that are True in `where`, `old` in the others."""
    where = where.reshape(where.shape + (1,) * (new.ndim - where.ndim))
    return jnp.where(place_like(where, new), new, place_like(old, new))
