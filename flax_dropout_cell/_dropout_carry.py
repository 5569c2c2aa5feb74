"""A Flax wrapper's carry: hosts draw it before their loop and hand it from step to step."""

from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from ._dropout_cell import Cell, draw_sites, dropout_cell
from ._noise import Noise
from ._random_words import fold_in
from ._spec import Masks, PyTree, RecurrentDropout, draws_at_each_step, draws_once


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


class CellWrapper:
    """What linen's and NNX's wrappers share: how a sequence starts, and where its noise sits.

    A framework's wrapper says which cells are LSTMs, what a cell holds, and what shapes its
    weights and outputs have.
    """

    cell: Any
    _lstm_cells: ClassVar[tuple[type, ...]]

    def _dropout(self, cell_carry: PyTree) -> RecurrentDropout:
        raise NotImplementedError

    def _parts(self) -> Iterable[Any]:
        raise NotImplementedError

    def _params_shapes(self, cell_carry: PyTree, x: PyTree) -> PyTree:
        raise NotImplementedError

    def _output_shapes(self, cell_carry: PyTree, x: PyTree) -> PyTree:
        raise NotImplementedError

    @property
    def num_feature_axes(self) -> int:
        """The number of feature axes of the wrapped cell's inputs."""
        return self.cell.num_feature_axes

    def _start(self, rng: jax.Array | None, cell_carry: PyTree, input_shape: Any) -> DropoutCarry:
        """The carry of a new sequence; without a key, of one that runs without dropout."""
        if rng is None:
            return DropoutCarry(cell_carry, None, None)
        dropout = self._dropout(cell_carry)
        x = input_shapes(input_shape, cell_carry)
        params = self._params_shapes(cell_carry, x) if draws_once(dropout.params) else None
        y = self._output_shapes(cell_carry, x) if draws_once(dropout.output) else None
        return start_sequence(cell_carry, rng, dropout, Masks(params, x, cell_carry, y))

    def _place_state(self, state: PyTree) -> PyTree:
        """Places what the user gave for `state` on the carry of the cell."""
        if isinstance(self.cell, CellWrapper):
            return DropoutCarry(self.cell._place_state(state), None, None)
        return self._spare_lstm_memory(state) if isinstance(state, Noise) else state

    def _spare_lstm_memory(self, noise: Noise) -> PyTree:
        """Places one noise for a whole state: on all of it, or on the h of an LSTM-family cell."""
        if isinstance(self.cell, self._lstm_cells):
            return (None, noise)
        for part in self._parts():
            if isinstance(part, (*self._lstm_cells, CellWrapper)):
                raise ValueError(
                    f"one noise for the whole state of {type(self.cell).__name__} would reach the "
                    f"memory c of the {type(part).__name__} that it holds; say where it goes, "
                    f"such as state=((None, noise), (None, noise)), or with a "
                    f"dropout_state_filter_visitor."
                )
        return noise


def input_shapes(input_shape: Any, cell_carry: PyTree) -> PyTree:
    """The inputs of a step, as far as they are known before they come."""
    # Nobody says their dtype. Masks are cast where they are used; for tracing a cell, that of its
    # carry is the best guess.
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(cell_carry) if hasattr(leaf, "dtype")]
    floating = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    dtype = floating[0] if floating else jnp.float32
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype), input_shape, is_leaf=is_shape
    )


def is_shape(node: Any) -> bool:
    """Tells a shape such as `(4, 20)` from a tuple of shapes."""
    return isinstance(node, tuple) and all(isinstance(dim, int) for dim in node)
