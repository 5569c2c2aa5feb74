"""NNX's cells, as `_flax.framework` asks about them."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import jax
from flax import nnx

from .._flax.compat import raw_value
from .._flax.framework import Framework, PureCell
from .._flax.layer import impure_cell_error
from .._spec.recurrent_dropout import PyTree
from .cells import GRUCell, LSTMCell


class NNX(Framework):
    """The adapter of NNX."""

    name, prefix, ours, sizes = "flax.nnx", "nnx", "fdc.nnx", "32, 64, rngs=rngs"
    weights_are = "nnx.Params"
    twins: ClassVar = {
        nnx.LSTMCell: LSTMCell,
        nnx.OptimizedLSTMCell: LSTMCell,
        nnx.GRUCell: GRUCell,
    }

    def is_module(self, value: Any) -> bool:
        """Whether a value is an NNX module."""
        return isinstance(value, nnx.Module)

    def parts(self, cell: Any) -> Iterable[Any]:
        """A cell, and all nodes of its graph."""
        return (node for _, node in nnx.iter_graph(cell))

    def sizes_of(self, cell: Any) -> str:
        """The cell's features in and out."""
        return f"{cell.in_features}, {cell.hidden_features}, rngs=rngs"

    def pure(self, cell: Any) -> PureCell:
        """A cell as a function of its weights."""
        return NNXPureCell(cell)

    def weights(self, cell: Any) -> PyTree:
        """The cell's Params as a plain dict."""
        return _weights(cell)

    def run_on(
        self, cell: Any, params: PyTree, carry: PyTree, x: PyTree, **options: Any
    ) -> tuple[PyTree, PyTree]:
        """Runs a copy with other weights, and gives the cell the other variables that it wrote."""
        copy, before = _copy(cell, params)
        result = copy(carry, x, **options)
        after = nnx.state(copy, nnx.Not(nnx.Param))
        # Flax forbids even an idle write if the cell comes from outside of a jax.lax.scan.
        if not _same(after, before):
            nnx.update(cell, after)
        return result

    def traceable(self, cell: Any) -> Callable[..., tuple[PyTree, PyTree]]:
        """A run of a copy."""

        def run(params: None, carry: PyTree, x: PyTree, **options: Any) -> tuple[PyTree, PyTree]:
            return _evaluating_copy(cell)(carry, x, **options)

        return run

    def params_shapes(self, cell: Any, carry: PyTree, x: PyTree) -> PyTree:
        """The cell's Params as a plain dict."""
        return self.weights(cell)

    def carry_shapes(self, cell: Any, input_shape: Any) -> PyTree:
        """The shapes of a cell's initial carry."""
        return jax.eval_shape(
            lambda: _evaluating_copy(cell).initialize_carry(input_shape, nnx.Rngs(0))
        )


class NNXPureCell:
    """A cell as a function of its weights."""

    def __init__(self, cell: nnx.RNNCellBase) -> None:
        self._cell = cell
        self.params = _weights(cell)

    def __call__(
        self, params: PyTree, carry: PyTree, x: PyTree, **options: Any
    ) -> tuple[PyTree, PyTree]:
        """One step of a copy, which must not write."""
        copy, before = _copy(self._cell, params, fresh=True)
        result: Any = copy(carry, x, **options)
        # By identity: comparing values would wait for the device. Not of Params, all of which
        # nnx.remat and nnx.jit replace.
        if not _same(nnx.state(copy, nnx.Not(nnx.Param)), before):
            raise impure_cell_error(self._cell, "writes a variable, or draws from an rng stream,")
        return result


NNX_FRAMEWORK = NNX()


def _weights(cell: nnx.RNNCellBase) -> PyTree:
    """A cell's Params as a plain dict, as they are stored: a copy calls their `get_value` again."""
    return nnx.to_pure_dict(nnx.state(cell, nnx.Param), raw_value)


def _copy(cell: nnx.RNNCellBase, params: PyTree, *, fresh: bool = False) -> tuple[Any, PyTree]:
    """A copy of a cell with other weights, and its other state.

    With `fresh` its variables are of the running trace: Flax raises at once if a step writes one of
    another, with an error that does not name the layer.
    """
    graphdef, own, rest = nnx.split(cell, nnx.Param, ...)
    weights = jax.tree.unflatten(jax.tree.structure(own), jax.tree.leaves(params))
    return nnx.merge(
        graphdef, weights, jax.tree.map(lambda leaf: leaf, rest) if fresh else rest
    ), rest


def _same(after: PyTree, before: PyTree) -> bool:
    """Whether two states hold the very same arrays."""
    return list(map(id, jax.tree.leaves(after))) == list(map(id, jax.tree.leaves(before)))


def _evaluating_copy(cell: nnx.RNNCellBase) -> Any:
    """A copy to trace for shapes; those are the same in training, which would need a stream."""
    graphdef, state = nnx.split(cell)
    copy: Any = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))
    copy.eval()
    return copy
