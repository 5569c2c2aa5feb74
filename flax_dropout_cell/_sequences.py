"""Several sequences in one scan: where each begins, which one a row is in, whose masks it has."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from ._rows import Rows, rows_by_id, rows_by_start
from ._sites import Masks, PyTree
from ._step import check_ids
from ._trees import broadcasts, outline


class Sequences(NamedTuple):
    """What happens to each row at each step.

    Attributes:
      begins: bool `[time, *batch]`: the row's carry starts anew before this step runs.
      names: ints `[time, *batch]`: the sequence that the row is in, by its id; or by the index of
        its first step, with -1 for the one that was running when the scan began.
    """

    begins: jax.Array
    names: jax.Array


def plan_sequences(resets: Any, sequence_ids: Any, steps: int, *, reverse: bool) -> Sequences:
    """Reads from `resets` and `sequence_ids` what happens at each step."""
    resets = _check_resets(resets, steps)
    if sequence_ids is None:
        indices = jnp.arange(steps, dtype=jnp.int32).reshape((steps,) + (1,) * (resets.ndim - 1))
        names = jax.lax.cummax(jnp.where(resets, indices, jnp.int32(-1)), axis=0)
    else:
        names = check_ids(sequence_ids)
        if names.shape != resets.shape:
            raise ValueError(
                f"beside resets, sequence_ids have a time axis too: expected the shape of resets, "
                f"{resets.shape}, got {names.shape}."
            )
    begins = resets
    if reverse:  # a sequence begins with its own last step, before the next one's first
        begins = jnp.concatenate([resets[1:], jnp.zeros_like(resets[:1])])
    return Sequences(begins, names)


def start_anew(begins: jax.Array, carry: PyTree, reset_carry: PyTree) -> PyTree:
    """The carry, with that of a new sequence in the rows where one begins."""

    def start(fresh: Any, old: jax.Array) -> jax.Array:
        fresh = jnp.broadcast_to(jnp.asarray(fresh, old.dtype), old.shape)
        return select_rows(begins, fresh, old)

    return jax.tree.map(start, reset_carry, carry)


def check_reset_carry(reset_carry: PyTree, carry: PyTree) -> PyTree:
    """The carry of a new sequence: zeros unless one is given that fits the carry."""
    if reset_carry is None:
        return jax.tree.map(lambda leaf: jnp.zeros((), jnp.result_type(leaf)), carry)
    if jax.tree.structure(reset_carry) != jax.tree.structure(carry):
        raise ValueError(
            f"reset_carry has the structure {outline(reset_carry)}, the carry {outline(carry)}; "
            f"they must be the same."
        )
    leaves = zip(tree_leaves_with_path(reset_carry), jax.tree.leaves(carry), strict=True)
    for (path, fresh), leaf in leaves:
        if not broadcasts(np.shape(fresh), np.shape(leaf)):
            raise ValueError(
                f"reset_carry{keystr(path)} has shape {np.shape(fresh)}, which does not broadcast "
                f"to the carry's {np.shape(leaf)}."
            )
    return reset_carry


class RowMasks:
    """The masks of a scan in which rows change from one sequence to another.

    Masks that rows share, and those of weights, stay. The others ride along in the scan's carry.

    Args:
      masks: the masks of the sequences that run when the scan begins.
      draw: draws the masks that each row has for itself, and None for all others.
      by_id: whether sequences are named by ids, rather than by their first step.
      start: the absolute index of the scan's first step.
    """

    def __init__(
        self,
        masks: Masks,
        draw: Callable[[Rows], Masks],
        names: jax.Array,
        *,
        by_id: bool,
        start: Any,
    ):
        self._masks, self._draw, self._by_id, self._start = masks, draw, by_id, start
        drawn = jax.eval_shape(lambda names: draw(self._rows(names)), names)

        def pick(drawn: Any, mask: Any) -> Any:
            if drawn is None:
                return None
            return jnp.broadcast_to(mask, drawn.shape).astype(drawn.dtype)

        self.first: Masks = jax.tree.map(pick, drawn, masks, is_leaf=lambda node: node is None)

    def change(self, own: Masks, names: jax.Array, new_names: jax.Array) -> Masks:
        """New masks for the rows whose sequence is another than before."""
        changed = names != new_names

        def redraw(own: Masks) -> Masks:
            drawn = self._draw(self._rows(new_names))
            if not self._by_id:
                back = new_names < 0
                drawn = jax.tree.map(
                    lambda first, new: select_rows(back, first, new), self.first, drawn
                )
            return jax.tree.map(lambda new, old: select_rows(changed, new, old), drawn, own)

        return jax.lax.cond(jnp.any(changed), redraw, lambda own: own, own)

    def fill(self, own: Masks) -> Masks:
        """All masks: the rows' own and the others."""
        return jax.tree.map(
            lambda mine, mask: mask if mine is None else mine,
            own,
            self._masks,
            is_leaf=lambda node: node is None,
        )

    def _rows(self, names: jax.Array) -> Rows:
        if self._by_id:
            return rows_by_id(names)
        return rows_by_start(names.astype(jnp.uint32) + jnp.asarray(self._start).astype(jnp.uint32))


def select_rows(where: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """`new` in the rows where asked, `old` in the others."""
    return jnp.where(where.reshape(where.shape + (1,) * (new.ndim - where.ndim)), new, old)


def _check_resets(resets: Any, steps: int) -> jax.Array:
    resets = jnp.asarray(resets)
    if resets.dtype != bool:
        raise TypeError(f"resets must be bools [time, *batch], got {resets.dtype}.")
    if resets.shape[:1] != (steps,):
        raise ValueError(
            f"resets must be [time, *batch] with the {steps} steps of xs, got shape {resets.shape}."
        )
    return resets
