"""What linen's and NNX's wrappers share: how a sequence starts, and where its noise sits."""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from .._disturb import inside_names
from .._leaky import Family, is_flax_gru, place_state
from .._sites import Masks, PyTree, RecurrentDropout, draws_once
from .._trees import shape_of
from .carry import DropoutCarry, start_sequence


class CellWrapper:
    """What linen's and NNX's wrappers share: how a sequence starts, and where its noise sits.

    A framework's wrapper says which cells are LSTMs, and what shapes a cell's weights and outputs
    have.
    """

    cell: Any
    _lstm_cells: ClassVar[tuple[type, ...]]

    def _dropout(self, cell_carry: PyTree) -> RecurrentDropout:
        raise NotImplementedError

    def _params_shapes(self, cell_carry: PyTree, x: PyTree) -> PyTree:
        raise NotImplementedError

    def _output_shapes(self, cell_carry: PyTree, x: PyTree) -> PyTree:
        raise NotImplementedError

    def _trace(
        self, cell_carry: PyTree, x: PyTree, names: frozenset[str]
    ) -> tuple[PyTree, dict[str, PyTree]]:
        """The shapes of the cell's output, and of what stands at its sites `names`."""
        del names
        return self._output_shapes(cell_carry, x), {}

    @property
    def num_feature_axes(self) -> int:
        """The number of feature axes of the wrapped cell's inputs."""
        return self.cell.num_feature_axes

    def _start(self, rng: jax.Array | None, cell_carry: PyTree, inputs: Any) -> DropoutCarry:
        """The carry of a new sequence; without a key, of one that runs without dropout.

        Args:
          rng: the sequence's key.
          cell_carry: the cell's own first carry.
          inputs: the shape of a step's input, as hosts give it, or its `jax.ShapeDtypeStruct`.
        """
        if rng is None:
            return DropoutCarry(cell_carry, None, None)
        dropout = self._dropout(cell_carry)
        return start_sequence(cell_carry, rng, dropout, self._values(dropout, cell_carry, inputs))

    def _values(self, dropout: RecurrentDropout, cell_carry: PyTree, inputs: Any) -> Masks:
        """The shapes and dtypes at each site, as far as masks are drawn there once."""
        for_params = draws_once(dropout.params)
        for_cell = draws_once(dropout.output) or draws_once(dropout.inside)
        failed = None
        for x in guesses(inputs, cell_carry):
            try:
                params = self._params_shapes(cell_carry, x) if for_params else None
                y, inside = None, {}
                if for_cell:
                    y, inside = self._trace(cell_carry, x, inside_names(dropout))
            except (TypeError, ValueError) as error:
                failed = failed or error  # a cell of tokens does not take floats
                continue
            return Masks(params, x, jax.tree.map(shape_of, cell_carry), y, inside)
        assert failed is not None
        raise failed

    def _place(self, dropout: RecurrentDropout, cell_carry: PyTree) -> RecurrentDropout:
        """Places what the user gave for `state` on the carry of the cell."""
        if isinstance(self.cell, CellWrapper):
            if isinstance(cell_carry, DropoutCarry):
                cell_carry = cell_carry.cell_carry
            placed = self.cell._place(dropout, cell_carry)
            if placed.state is None:
                return placed
            return dataclasses.replace(placed, state=DropoutCarry(placed.state, None, None))
        family: Family = "gru" if is_flax_gru(self.cell) else None
        if isinstance(self.cell, self._lstm_cells):
            family = "lstm"
        return place_state(dropout, cell_carry, family)


def guesses(inputs: Any, cell_carry: PyTree) -> Iterable[PyTree]:
    """The inputs of a step, as far as they are known before they come, the likeliest first.

    Nobody says their dtype. Most often it is the carry's; tokens are ints. A mask that depends on
    it is drawn once more where the inputs are something else.
    """
    leaves, structure = jax.tree.flatten(inputs, is_leaf=is_shape)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(cell_carry) if hasattr(leaf, "dtype")]
    floating = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    likely = floating[0] if floating else jnp.float32
    choices = [(likely, jnp.int32) if is_shape(leaf) else (leaf.dtype,) for leaf in leaves]
    for picked in itertools.islice(itertools.product(*choices), 16):
        yield jax.tree.unflatten(
            structure,
            [
                jax.ShapeDtypeStruct(leaf if is_shape(leaf) else leaf.shape, dtype)
                for leaf, dtype in zip(leaves, picked, strict=True)
            ],
        )


def input_shapes(inputs: Any, cell_carry: PyTree) -> PyTree:
    """The likeliest inputs of a step for their shapes."""
    return next(iter(guesses(inputs, cell_carry)))


def is_shape(node: Any) -> bool:
    """Tells a shape such as `(4, 20)` from a tuple of shapes."""
    return isinstance(node, tuple) and all(isinstance(dim, int) for dim in node)
