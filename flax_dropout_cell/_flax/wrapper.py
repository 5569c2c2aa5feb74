"""What linen's and NNX's wrappers share: how a sequence starts, and where its noise sits."""

from collections.abc import Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from .._sites import Masks, PyTree, RecurrentDropout, draws_once
from ..noises import Noise
from .carry import DropoutCarry, start_sequence


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
