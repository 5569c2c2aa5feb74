"""Episode ids, which tie an episode to its masks in every row and rollout."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._arguments import check_count


def episode_ids(
    ids: jax.typing.ArrayLike, done: jax.typing.ArrayLike, *, num_rows: int | None = None
) -> jax.Array:
    """The episode ids of the next step: a new id for each row whose episode is done.

    Pass them to `dropout_scan` or a layer as `sequence_ids`, with `done` as the next step's
    `resets`: the masks of an episode then follow it from the actor to the learner. Start from
    `jnp.arange(num_rows)`. Each row counts up in steps of `num_rows`, so no two episodes get the
    same id until int32 wraps around, after 2**32 of them.

    Store the ids with each transition instead of counting again in the learner: a minibatch with
    fewer rows would count in smaller steps.

    Args:
      ids: ints `[*batch]`, the ids of this step.
      done: bools `[*batch]`, True if this step is the last of its episode.
      num_rows: the number of rows on all devices, by default that of `done`. Set it under
        `jax.pmap` or `jax.shard_map`, because each device sees only its own rows.

    Returns:
      The ids of the next step, `[*batch]`.

    Raises:
      TypeError: if `ids` are not ints of at least 32 bits, or `done` are not bools.
      ValueError: if the shapes differ, NumPy ids do not fit in JAX's ints of 32 bits, or `num_rows`
        is less than the rows of `done`.

    Example:
      >>> import jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> ids = jnp.arange(3)
      >>> ids = fdc.episode_ids(ids, jnp.array([True, False, False]))
      >>> fdc.episode_ids(ids, jnp.array([True, True, False]))
      Array([6, 4, 2], dtype=int32)
    """
    ids, done = _as_jax_ids(ids), jnp.asarray(done)
    _check(ids, done)
    if num_rows is None:
        num_rows = done.size
    elif not isinstance(num_rows, jax.Array) and check_count("num_rows", num_rows) < done.size:
        raise ValueError(
            f"num_rows must be at least {done.size}, the rows of done, got {num_rows}: "
            f"otherwise two rows would get the same id."
        )
    # By the number of rows, so that rows never meet: row i has the ids i, i + n, i + 2n.
    return jnp.where(done, ids + num_rows, ids)


def _as_jax_ids(ids: Any) -> jax.Array:
    """Ids as a JAX array; raises if JAX would truncate them to 32 bits."""
    if isinstance(ids, np.ndarray | np.generic) and jnp.issubdtype(ids.dtype, jnp.integer):
        narrow = jax.dtypes.canonicalize_dtype(ids.dtype)
        if (ids.astype(narrow) != ids).any():
            raise ValueError(
                f"ids have more than the 32 bits that JAX keeps of {ids.dtype}: start from "
                f"jnp.arange(num_rows), or turn jax_enable_x64 on."
            )
    return jnp.asarray(ids)


def _check(ids: Any, done: Any) -> None:
    if not jnp.issubdtype(ids.dtype, jnp.integer) or jnp.iinfo(ids.dtype).bits < 32:
        raise TypeError(f"ids must be ints of at least 32 bits, got {ids.dtype}.")
    if done.dtype != bool:
        raise TypeError(f"done must be bools, got {done.dtype}: write done.astype(bool).")
    if ids.shape != done.shape:
        raise ValueError(f"ids and done must be of one step, got shapes {ids.shape}, {done.shape}.")
