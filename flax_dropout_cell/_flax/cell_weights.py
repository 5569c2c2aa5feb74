"""Shared by the cells of linen and NNX: dtypes, and checks of weights."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from .._messages import short_repr, with_article
from ..cells import GRUParams, LRUParams, LSTMParams, MinGRUParams, MinLSTMParams, RGLRUParams
from ..cells.checks import check_gates

LinearParams = LRUParams | MinGRUParams | MinLSTMParams | RGLRUParams


def promote(x: jax.Array, params: Any, dtype: Any) -> tuple[jax.Array, Any]:
    """The input and the weights that it is multiplied with, in the dtype of the computation.

    Eigenvalues and decays keep their own dtype: half precision would round a memory of 1,000 steps
    to a quite different length.
    """
    names = [name for name in params._fields if name.endswith(("kernel", "bias"))]
    weights = [getattr(params, name) for name in names]
    dtype = jnp.result_type(x, *weights) if dtype is None else dtype
    promoted = {name: leaf.astype(dtype) for name, leaf in zip(names, weights, strict=True)}
    return jnp.asarray(x).astype(dtype), params._replace(**promoted)


def complex_dtype(dtype: Any) -> Any:
    """The dtype of an LRU's h; complex numbers do not come in half precision."""
    return jnp.complex128 if jnp.finfo(dtype).bits > 32 else jnp.complex64


def check_params(params: Any, shapes: Callable[[int], Any], cell: Any) -> None:
    """Raises if weights are not those of the cell; `shapes` takes the number of input features."""
    kind = type(shapes(1))
    if type(params) is not kind:
        raise wrong_weights_error(cell, kind, params)
    in_features = params.input_kernel.shape[0] if params.input_kernel.ndim else 1
    for name, leaf, like in zip(params._fields, params, shapes(in_features), strict=True):
        if leaf.shape != like.shape:
            wanted = f"{list(like.shape)} for this {type(cell).__name__}"
            raise ValueError(f"{name} must be {wanted}, got {list(leaf.shape)}.")


def wrong_weights_error(cell: Any, wanted: type, params: Any) -> TypeError:
    """The error for weights of another kind of cell."""
    return TypeError(f"{type(cell).__name__} takes {wanted.__name__}, got {short_repr(params)}.")


def wrong_variables_error(cell: Any, wanted: Iterable[str], got: Iterable[Any]) -> ValueError:
    """The error for variables of another kind of cell."""
    return ValueError(
        f"{type(cell).__name__} has the weights {', '.join(wanted)}; these variables hold "
        f"{', '.join(map(str, got)) or 'none'}."
    )


def check_leaves(cell: Any, wanted: Iterable[str], variables: Mapping[str, Any]) -> None:
    """Raises if a weight is missing; `wanted` has the paths of all, such as "hi/bias"."""
    missing = sorted(set(wanted) - flatten_dict(variables, sep="/").keys())
    if missing:
        name = type(cell).__name__
        raise ValueError(f"these variables lack weights of {name}: {', '.join(missing)}.")


def unknown_weights_error(cell: Any) -> TypeError:
    """The error for a cell that this library has no weights for."""
    return TypeError(
        f"cell_params and core_params convert the weights of LSTMCell, OptimizedLSTMCell, GRUCell "
        f"and this library's cells, got {with_article(type(cell).__name__)}"
        f"{': give its cell' if hasattr(cell, 'cell') else ''}."
    )


def params_of(variables: Mapping[str, Any], shapes: Callable[[int], Any], cell: Any) -> Any:
    """Variables as the core's weights; `shapes` takes the number of input features."""
    like = shapes(1)
    if set(like._fields) != set(variables):
        raise wrong_variables_error(cell, like._fields, variables)
    params = type(like)(**variables)
    check_params(without_stack(params), shapes, cell)
    return params


def without_stack(params: Any) -> Any:
    """The shapes of one cell's weights, if `jax.vmap` has stacked those of several."""

    def shape(name: str, leaf: Any) -> Any:
        ndim = 2 if name.endswith("kernel") else 1
        return None if leaf is None else jax.ShapeDtypeStruct(leaf.shape[-ndim:], leaf.dtype)

    leaves = params._asdict().items()
    return type(params)(**{name: shape(name, leaf) for name, leaf in leaves})


def features_of(function: str, params: LSTMParams | GRUParams) -> int:
    """The features of an LSTM's or a GRU's weights; raises if their shapes do not fit."""
    return check_gates(function, params, 3 if isinstance(params, GRUParams) else 4)
