"""A Flax wrapper's carry: hosts draw it before their loop and hand it from step to step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._random.keys import fold_in
from .._sites import Masks, PyTree, RecurrentDropout, draws_at_each_step
from .._step import Cell, draw_sites, dropout_cell


class StepRng(NamedTuple):
    """A sequence's key and the index of its next step.

    Both have an axis of length 1, since `nn.RNN` and `nnx.RNN` index every leaf of a carry with
    `[time, batch]` when they are given `seq_lengths` and `return_carry`. That turns the axis into
    one of length batch, with each row at its own step.
    """

    key: jax.Array
    step: jax.Array


class DropoutCarry(NamedTuple):
    """The carry of `DropoutCell`: the cell's own, and the randomness of the running sequence.

    Handed on to a next window it goes on as one long sequence that was cut. To start new masks
    on an old state, see `redraw_masks` of the wrapper.

    Attributes:
      cell_carry: what the wrapped cell carries, such as an LSTM's `(c, h)`.
      masks: the variational masks of this sequence; None in evaluation.
      rng: where the per-step masks come from; None where there are none.
    """

    cell_carry: Any
    masks: Masks | None
    rng: StepRng | None


def start_sequence(
    cell_carry: PyTree, rng: jax.Array, dropout: RecurrentDropout, values: Masks
) -> DropoutCarry:
    """Draws a sequence's masks for `values`, each site's value or its shapes and dtypes."""
    masks = draw_sites(dropout, values, rng)
    # Weights have no batch dim for a host to index, so their masks get one of length 1.
    masks = masks._replace(params=jax.tree.map(lambda mask: mask[None], masks.params))
    step_rng = None
    if draws_at_each_step(dropout):
        step_rng = StepRng(rng[None], jnp.zeros((1,), jnp.int32))
    return DropoutCarry(cell_carry, masks, step_rng)


def run_step(
    carry: DropoutCarry,
    x: PyTree,
    *,
    cell: Cell,
    params: PyTree,
    dropout: RecurrentDropout,
    deterministic: bool,
) -> tuple[DropoutCarry, PyTree]:
    """One step of a wrapped cell."""
    if not isinstance(carry, DropoutCarry):
        raise TypeError(
            f"the carry must be a DropoutCarry, got {type(carry).__name__}: start with "
            f"initialize_carry, or with redraw_masks to go on from a cell's own carry."
        )
    if deterministic:
        cell_carry, y = dropout_cell(params, carry.cell_carry, x, None, cell=cell, dropout=dropout)
        return carry._replace(cell_carry=cell_carry), y
    if carry.masks is None:
        raise ValueError(
            "the carry was made in evaluation and has no masks: call redraw_masks to train on "
            "from it."
        )
    masks = carry.masks._replace(params=jax.tree.map(lambda mask: mask[0], carry.masks.params))
    rng, step_rng = None, carry.rng
    if step_rng is not None:
        # Where rows are at different steps, the furthest sets the pace: no row then sees a mask
        # for a second time.
        step = jnp.max(step_rng.step)
        rng = fold_in(step_rng.key[0], step)
        step_rng = step_rng._replace(step=jnp.full_like(step_rng.step, step + 1))
    cell_carry, y = dropout_cell(
        params, carry.cell_carry, x, rng, cell=cell, dropout=dropout, masks=masks
    )
    return DropoutCarry(cell_carry, carry.masks, step_rng), y
