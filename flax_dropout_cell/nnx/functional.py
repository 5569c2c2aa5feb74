"""An NNX cell as a function: of its weights, and of shapes."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from .._sites import PyTree, active_noises


def params_of(cell: nnx.RNNCellBase, noises: PyTree) -> dict[str, Any]:
    """A cell's weights, of which `noises` is to be a prefix; there must be some."""
    params = nnx.to_pure_dict(nnx.state(cell, nnx.Param))
    if active_noises(noises) and not jax.tree.leaves(params):
        nodes = (node for _, node in nnx.iter_graph(cell))
        others = {type(node).__name__ for node in nodes if isinstance(node, nnx.Variable)}
        held = f"holds {', '.join(sorted(others))}" if others else "holds no weights"
        raise ValueError(
            f"dropout.params has noise, but {type(cell).__name__} has no nnx.Param for it: it "
            f"{held}. Make its weights nnx.Params, or leave params out."
        )
    return params


def call_with_params(
    cell: nnx.RNNCellBase, params: PyTree, carry: PyTree, x: PyTree, **sites: Any
) -> tuple[PyTree, PyTree]:
    """Runs the cell with other weights, which are gone afterwards; what else it writes stays."""
    graphdef, own, rest = nnx.split(cell, nnx.Param, ...)
    others = jax.tree.unflatten(jax.tree.structure(own), jax.tree.leaves(params))
    copy = nnx.merge(graphdef, others, rest)
    before = jax.tree.leaves(rest)
    result = copy(carry, x, **sites)
    after = nnx.state(copy, nnx.Not(nnx.Param))
    # Flax forbids even an idle write where the cell comes from outside of a jax.lax.scan.
    if list(map(id, jax.tree.leaves(after))) != list(map(id, before)):
        nnx.update(cell, after)
    return result


def functional_cell(cell: nnx.RNNCellBase) -> Callable[..., tuple[PyTree, PyTree]]:
    """The cell as a function to be traced for shapes, on a copy whose own state stays as it is."""
    graphdef, state = nnx.split(cell)

    def run(params: None, carry: PyTree, x: PyTree, **sites: Any) -> tuple[PyTree, PyTree]:
        copy = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))
        copy.eval()  # shapes are those of training, and there is no stream to draw from
        return copy(carry, x, **sites)

    return run


def trace(cell: nnx.RNNCellBase, run: Callable[..., PyTree], *args: PyTree) -> PyTree:
    """The shapes of `run(cell, *args)`, on a copy: the cell's own state stays as it is."""
    graphdef, state = nnx.split(cell)

    def trace(state: PyTree, *args: PyTree) -> PyTree:
        copy = nnx.merge(graphdef, state)
        copy.eval()  # shapes are those of training, and there is no stream to draw from
        return run(copy, *args)

    return jax.eval_shape(trace, state, *args)
