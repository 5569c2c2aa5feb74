"""What a step of a scan does around the cell: new sequences, padding, masks of its own."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from ._disturb import Disturbance
from ._inside import Cell
from ._random.keys import step_rng
from ._rows import rows_by_id
from ._sequences import RowMasks, Sequences, select_rows, start_anew
from ._sites import PARAMS, Leaf, PyTree, draws_at_each_step
from ._step import run_step


class At(NamedTuple):
    """What comes in at a step.

    Attributes:
      place: the step, counted from the scan's first.
      x: the cell's input.
      now: what happens to each row; None where no row starts anew.
    """

    place: jax.Array
    x: PyTree
    now: Sequences | None


class Running(NamedTuple):
    """What a step hands on.

    Attributes:
      carry: the cell's carry.
      masks: the masks that rows have for themselves; None where they have none that can change.
      names: the sequence that each row is in; None where no row starts anew.
    """

    carry: PyTree
    masks: Any = None
    names: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class SequenceStep:
    """A step of a scan, as a function.

    Attributes:
      cell: the cell.
      weights: its weights, disturbed where their masks are drawn once.
      disturbance: what disturbs every step; its key is the sequence's.
      start: the absolute index of the first step.
      seq_lengths: how long each row is; None where all fill the scan.
      reset_carry: the carry of a new sequence.
      row_masks: how rows get new masks; None where they need none.
      by_id: whether rows draw by ids.
    """

    cell: Cell
    weights: PyTree
    disturbance: Disturbance
    start: Any
    seq_lengths: jax.Array | None
    reset_carry: PyTree
    row_masks: RowMasks | None
    by_id: bool

    def __call__(self, running: Running, at: At) -> tuple[Running, PyTree]:
        """Runs the step, in rows that begin a sequence with that sequence's carry and masks."""
        disturbance = self.disturbance
        if at.now is None:
            carry, y = self._run_valid(running.carry, at, disturbance)
            return Running(carry), y
        carry, masks = start_anew(at.now.begins, running.carry, self.reset_carry), running.masks
        if self.row_masks is not None:
            masks = self.row_masks.change(masks, running.names, at.now.names)
            disturbance = dataclasses.replace(disturbance, masks=self.row_masks.fill(masks))
        if self.by_id:
            disturbance = dataclasses.replace(disturbance, rows=rows_by_id(at.now.names))
        carry, y = self._run_valid(carry, at, disturbance)
        return Running(carry, masks, at.now.names), y

    def _run_valid(self, carry: PyTree, at: At, disturbance: Disturbance) -> tuple[PyTree, PyTree]:
        """The cell's step; past a row's end its carry stands still and its y is zero."""
        if self.seq_lengths is None:
            return self._run_cell(carry, at.place, at.x, disturbance)
        valid = at.place.astype(jnp.int32) < self.seq_lengths
        # Padding is blanked before the cell sees it: a NaN there would come back through the
        # gradient of the very result that is thrown away.
        x = _blank(at.x, valid)
        new_carry, y = self._run_cell(carry, at.place, x, disturbance)
        check_batch_dims("ys", y, self.seq_lengths.shape, "seq_lengths")
        stay = jax.tree.map(lambda new, old: select_rows(valid, new, old), new_carry, carry)
        return stay, _blank(y, valid)

    def _run_cell(
        self, carry: PyTree, index: jax.Array, x: PyTree, disturbance: Disturbance
    ) -> tuple[PyTree, PyTree]:
        """The cell's step, with the step's own key and with weights that are disturbed."""
        dropout, rng, weights = disturbance.dropout, disturbance.rng, self.weights
        if rng is not None and draws_at_each_step(dropout):
            step = jnp.asarray(self.start).astype(jnp.uint32) + index
            disturbance = dataclasses.replace(disturbance, rng=step_rng(rng, step))
        if draws_at_each_step(dropout.params) and not disturbance.evaluates:
            weights = disturbance(PARAMS, weights, where=lambda leaf: not is_once(leaf))
        return run_step(weights, carry, x, self.cell, disturbance, scanned=True)


def disturb_once(disturbance: Disturbance, params: PyTree) -> PyTree:
    """The weights, disturbed where that can be done before the scan."""
    evaluates = disturbance.evaluates
    return disturbance(PARAMS, params, where=lambda leaf: evaluates or is_once(leaf))


def is_once(leaf: Leaf) -> bool:
    """Whether a weight's mask is the same at all steps."""
    return leaf.noise is None or leaf.mask is not None


def check_batch_dims(name: str, tree: PyTree, batch: tuple[int, ...], of: str) -> None:
    """Refuses leaves at a step that do not start with the batch dims."""
    for path, leaf in tree_leaves_with_path(tree):
        if np.shape(leaf)[: len(batch)] != batch:
            raise ValueError(
                f"{name}{keystr(path)} has shape {np.shape(leaf)} at a step, which does not start "
                f"with the batch dims of {of}, {batch}."
            )


def _blank(tree: PyTree, valid: jax.Array) -> PyTree:
    """Zeroes the rows that are not valid, in every leaf that has rows."""

    def blank(leaf: jax.Array) -> jax.Array:
        if leaf.shape[: valid.ndim] != valid.shape:
            return leaf
        return select_rows(valid, leaf, jnp.zeros_like(leaf))

    return jax.tree.map(blank, tree)
