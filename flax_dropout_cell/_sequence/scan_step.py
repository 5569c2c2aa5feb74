"""One step of `dropout_scan`: resets, padding and per-step masks around the cell."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._random.keys import step_rng
from .._spec.match_leaves import Leaf
from .._spec.recurrent_dropout import PARAMS, Masks, PyTree, draws_at_each_step, fill_in
from .._step.apply_noise import StepNoise
from .._step.call_cell import Cell
from .._step.dropout_cell import run_step
from .._step.sequence_ids import SequenceIds
from .padding import check_rows, keep_rows
from .resets import RowMasks, Sequences, reset_carry_rows


class StepInput(NamedTuple):
    """The scan's inputs at a step.

    Attributes:
      offset: the index of the step, from 0 at the scan's first.
      x: the cell's input.
      valid: False for rows that are at padding; None if there is no padding.
      sequences: the sequence of each row; None if there are no resets.
      masks: the step's own masks, as far as they are drawn before the loop.
    """

    offset: jax.Array
    x: PyTree
    valid: jax.Array | None
    sequences: Sequences | None
    masks: Masks | None


class ScanCarry(NamedTuple):
    """The scan's carry.

    Attributes:
      carry: the cell's carry; errors show users its name.
      masks: the masks that change when a row resets; None if there are none.
      ids: the sequence of each row; None if there are no resets.
    """

    carry: PyTree
    masks: Masks | None = None
    ids: SequenceIds | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class SequenceStep:
    """A step of a scan, as a function.

    Attributes:
      cell: the cell.
      weights: its weights, with the noise that is drawn once.
      step_noise: the noise of every step; its key is the sequence's.
      start: the absolute index of the first step.
      stand_ins: the inputs that replace padding.
      reset_carry: the carry of a new sequence.
      row_masks: the masks of rows that change sequences; None if none do.
    """

    cell: Cell
    weights: PyTree
    step_noise: StepNoise
    start: Any
    stand_ins: PyTree
    reset_carry: PyTree
    row_masks: RowMasks | None

    def __call__(self, running: ScanCarry, inputs: StepInput) -> tuple[ScanCarry, PyTree]:
        """Runs the step; rows that begin a sequence get its carry and masks first."""
        step_noise = self.step_noise
        if inputs.sequences is None:
            carry, y = self._run_valid(running.carry, inputs, step_noise)
            return ScanCarry(carry), y
        carry = reset_carry_rows(inputs.sequences.is_first_step, running.carry, self.reset_carry)
        masks = running.masks
        if self.row_masks is not None and masks is not None and running.ids is not None:
            masks = self.row_masks.redraw(masks, running.ids, inputs.sequences.ids)
            step_noise = dataclasses.replace(step_noise, masks=self.row_masks.merge_shared(masks))
        if step_noise.ids is not None:  # the caller gave ids
            step_noise = dataclasses.replace(step_noise, ids=inputs.sequences.ids)
        carry, y = self._run_valid(carry, inputs, step_noise)
        return ScanCarry(carry, masks, inputs.sequences.ids), y

    def _run_valid(
        self, carry: PyTree, inputs: StepInput, step_noise: StepNoise
    ) -> tuple[PyTree, PyTree]:
        """The cell's step; at padding a row keeps its carry, and its y is zero."""
        if inputs.masks is not None and step_noise.masks is not None:
            masks = fill_in(step_noise.masks, inputs.masks)
            step_noise = dataclasses.replace(step_noise, masks=masks)
        if inputs.valid is None:
            return self._run_cell(carry, inputs.offset, inputs.x, step_noise)
        # Padding may hold NaN, so the cell must not see it: see `stand_ins`.
        x = keep_rows(inputs.valid, inputs.x, self.stand_ins)
        new_carry, y = self._run_cell(carry, inputs.offset, x, step_noise)
        check_rows("ys", y, inputs.valid.shape, "seq_lengths or valid")
        blank = jax.tree.map(jnp.zeros_like, y)
        return keep_rows(inputs.valid, new_carry, carry), keep_rows(inputs.valid, y, blank)

    def _run_cell(
        self, carry: PyTree, offset: jax.Array, x: PyTree, step_noise: StepNoise
    ) -> tuple[PyTree, PyTree]:
        """The cell's step, with the step's own key and with noise on the weights."""
        dropout, rng, weights = step_noise.dropout, step_noise.rng, self.weights
        if rng is not None and draws_at_each_step(dropout):
            step = jnp.asarray(self.start).astype(jnp.uint32) + offset
            step_noise = dataclasses.replace(step_noise, rng=step_rng(rng, step))
        # `weights` has the noise that is drawn once (`disturb_once`); that of each step comes here.
        if draws_at_each_step(dropout.params) and not step_noise.evaluates:
            weights = step_noise(PARAMS, weights, where=lambda leaf: not is_known_before_loop(leaf))
        return run_step(weights, carry, x, self.cell, step_noise, scanned=True)


def disturb_once(step_noise: StepNoise, params: PyTree) -> PyTree:
    """The weights, with all noise that can be applied before the scan."""

    def where(leaf: Leaf) -> bool:
        # A variational noise without a mask must raise here, because no step would notice.
        variational = leaf.noise is not None and leaf.noise.variational
        return step_noise.evaluates or is_known_before_loop(leaf) or variational

    return step_noise(PARAMS, params, where=where)


def is_known_before_loop(leaf: Leaf) -> bool:
    """Whether a weight's mask is the same at all steps."""
    return leaf.noise is None or leaf.mask is not None
