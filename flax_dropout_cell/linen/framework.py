"""linen's cells, as `_flax.framework` asks about them."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import unfreeze

from .._flax.compat import copy_into
from .._flax.framework import Framework
from .._flax.wrapper import CellWrapper
from .._spec.recurrent_dropout import PyTree
from .cells import GRUCell, LSTMCell
from .pure_cell import LinenPureCell, variables_of
from .submodules import parts_of
from .weights import run_on, unbox, weights_of


class Linen(Framework):
    """The adapter of linen."""

    name, prefix, ours, sizes = "flax.linen", "nn", "fdc.linen", "64"
    weights_are = "in the collection 'params'"
    twins: ClassVar = {nn.LSTMCell: LSTMCell, nn.OptimizedLSTMCell: LSTMCell, nn.GRUCell: GRUCell}

    def is_module(self, value: Any) -> bool:
        """Whether a value is a linen module."""
        return isinstance(value, nn.Module)

    def parts(self, cell: Any) -> Iterable[Any]:
        """A cell, and the modules in its fields."""
        return parts_of(cell)

    def sizes_of(self, cell: Any) -> str:
        """The cell's features."""
        return str(cell.features)

    def pure(self, cell: Any) -> LinenPureCell:
        """A bound cell as a function of its weights."""
        return LinenPureCell(cell)

    def weights(self, cell: Any) -> PyTree:
        """The weights of a bound cell."""
        return weights_of(cell)

    def run_on(
        self, cell: Any, params: PyTree, carry: PyTree, x: PyTree, **options: Any
    ) -> tuple[PyTree, PyTree]:
        """Runs a bound cell on other weights."""
        return run_on(cell, params, carry, x, **options)

    def traceable(self, cell: Any) -> Callable[..., tuple[PyTree, PyTree]]:
        """A run of a free copy, which makes its weights as it goes if it has none."""

        def run(
            params: PyTree | None, carry: PyTree, x: PyTree, **options: Any
        ) -> tuple[PyTree, PyTree]:
            if params is None:
                return _init(cell, carry, x, **options)[0]
            return _apply(cell, params, carry, x, **options)

        return run

    def params_shapes(self, cell: Any, carry: PyTree, x: PyTree) -> PyTree:
        """The weights of a bound cell, or the shapes of those that a free one would make."""
        if cell.scope is not None and not cell.is_initializing():
            return weights_of(cell)
        _, variables = jax.eval_shape(lambda carry, x: _init(cell, carry, x), carry, x)
        return unbox(unfreeze(variables)).get("params", {})

    def carry_shapes(self, cell: Any, input_shape: Any) -> PyTree:
        """The shapes of a cell's initial carry."""

        def run(rng: jax.Array) -> PyTree:
            if not any(isinstance(part, CellWrapper) for part in parts_of(cell)):
                return cell.initialize_carry(rng, input_shape)
            # A wrapper inside would draw from the running module's stream, and so move the masks
            # of that module's other draws. A free copy has a stream of its own.
            variables, streams = {}, {"dropout"}
            if cell.scope is not None:
                variables = nn.unbox(variables_of(cell)) | {"params": weights_of(cell)}
                streams |= cell.scope.rngs.keys()
            free = copy_into(None, cell, renamed=True)
            carry, _ = free.apply(
                variables,
                rng,
                input_shape,
                rngs=dict.fromkeys(streams, rng),
                method=type(free).initialize_carry,
                mutable=True,  # for variables that the cell has yet to make
            )
            return carry

        return jax.eval_shape(run, jax.random.key(0))


LINEN = Linen()


def _init(cell: nn.Module, carry: PyTree, x: PyTree, **options: Any) -> Any:
    """`((carry, y), variables)` of a free copy of the cell."""
    return copy_into(None, cell, renamed=True).init_with_output(
        jax.random.key(0), carry, x, **options
    )


def _apply(cell: nn.Module, params: PyTree, carry: PyTree, x: PyTree, **options: Any) -> Any:
    """`(carry, y)` of a free copy with the given weights, whose other variables are zeros."""
    others = dict(unfreeze(jax.eval_shape(lambda *args: _init(cell, *args)[1], carry, x)))
    others.pop("params", None)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), others)
    variables, rngs = {**zeros, "params": params}, {"params": jax.random.key(0)}
    return copy_into(None, cell, renamed=True).apply(
        variables, carry, x, rngs=rngs, mutable=True, **options
    )[0]
