"""This library's cells as NNX cells, under the names that Flax gives their weights."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict

from .._arguments import check_flag
from .._flax.cell_weights import (
    LinearParams,
    check_leaves,
    check_params,
    features_of,
    params_of,
    unknown_weights_error,
    without_stack,
    wrong_variables_error,
    wrong_weights_error,
)
from .._messages import must_be, with_article
from ..cells.disturb import Disturb, undisturbed
from ..cells.gru import GRUParams, gru_step
from ..cells.lstm import LSTMParams, lstm_step
from .linear_cells import LinearCell

Params = LSTMParams | GRUParams | LinearParams


class LSTMCell(nnx.OptimizedLSTMCell):
    """`nnx.OptimizedLSTMCell` with sites inside: `lstm_cell` under Flax's names.

    Weights of `nnx.OptimizedLSTMCell` load as they are; those of `nnx.LSTMCell`, which has other
    names, by `core_params` and `cell_params`. It draws nothing of its own: noise at its sites
    comes from `RecurrentDropout(inside={site: ..})`; `fdc.lstm_cell` lists them.

    Args:
      in_features: the size of x.
      hidden_features: the size of c and h. The other arguments are those of
        `nnx.OptimizedLSTMCell`: gate_fn, activation_fn, kernel_init, recurrent_kernel_init,
        bias_init, dtype, param_dtype, rngs and more.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> cell, x = fdc.nnx.LSTMCell(3, 8, rngs=nnx.Rngs(0)), jnp.ones((4, 3))
      >>> carry = cell.initialize_carry(x.shape, nnx.Rngs(1))
      >>> (c, h), y = cell(carry, x)
      >>> c.shape, y.shape
      ((4, 8), (4, 8))
    """

    def __call__(
        self, carry: Any, inputs: jax.Array, *, disturb: Disturb = undisturbed
    ) -> tuple[Any, jax.Array]:
        """One step.

        Args:
          carry: `(c, h)`, or `LSTMState(c, h)`, each `[*batch, hidden_features]`.
          inputs: `[*batch, in_features]`.
          disturb: called at each site inside.

        Returns:
          `(carry, y)`: the carry as it came; y is the new h.
        """
        x, input_kernel, _ = _promote(self.dense_i, inputs)
        _, recurrent_kernel, bias = _promote(self.dense_h, x)
        params = LSTMParams(input_kernel, recurrent_kernel, bias)
        return lstm_step(params, carry, x, disturb, self.gate_fn, self.activation_fn)


class GRUCell(nnx.GRUCell):
    """`nnx.GRUCell` with sites inside: `gru_cell` under Flax's names.

    Weights of `nnx.GRUCell` load as they are. That cell lacks the second bias of n that linen's,
    PyTorch's and Keras' GRUs have; `use_recurrent_bias=True` adds it, so that their weights fit.
    It draws nothing of its own: noise at its sites comes from
    `RecurrentDropout(inside={site: ..})`; `fdc.gru_cell` lists them.

    Args:
      in_features: the size of x.
      hidden_features: the size of h.
      use_recurrent_bias: whether there is a `recurrent_bias`, `[hidden_features]`, zero at first,
        in addition to the weights of `nnx.GRUCell`.
      rngs: the source of the initial weights.
      **options: the other arguments of `nnx.GRUCell`: gate_fn, activation_fn, kernel_init,
        recurrent_kernel_init, bias_init, dtype, param_dtype and more.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> cell, x = fdc.nnx.GRUCell(3, 8, rngs=nnx.Rngs(0)), jnp.ones((4, 3))
      >>> h, y = cell(cell.initialize_carry(x.shape, nnx.Rngs(1)), x)
      >>> y.shape
      (4, 8)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        use_recurrent_bias: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        super().__init__(in_features, hidden_features, rngs=rngs, **options)
        self.use_recurrent_bias = check_flag("use_recurrent_bias", use_recurrent_bias)
        # Data even if it is None, so that an array may take its place later.
        self.recurrent_bias: Any = nnx.data(None)
        if use_recurrent_bias:
            self.recurrent_bias = nnx.Param(jnp.zeros(hidden_features, self.param_dtype))

    def __call__(
        self, carry: jax.Array, inputs: jax.Array, *, disturb: Disturb = undisturbed
    ) -> tuple[jax.Array, jax.Array]:
        """One step.

        Args:
          carry: h, `[*batch, hidden_features]`.
          inputs: `[*batch, in_features]`.
          disturb: called at each site inside.

        Returns:
          `(h, y)`: the new h, twice.
        """
        x, input_kernel, bias = _promote(self.dense_i, inputs)
        _, recurrent_kernel, _ = _promote(self.dense_h, x)
        recurrent_bias = None
        if self.recurrent_bias is not None:
            recurrent_bias = self.recurrent_bias[...].astype(recurrent_kernel.dtype)
        params = GRUParams(input_kernel, recurrent_kernel, bias, recurrent_bias)
        return gru_step(params, carry, x, disturb, self.gate_fn, self.activation_fn)


def _promote(dense: nnx.Linear, x: jax.Array) -> Any:
    """The input and a layer's weights in the dtype of the computation."""
    if type(dense).__call__ is not nnx.Linear.__call__:
        raise TypeError(
            f"the cell reads the weights of an nnx.Linear and does not call it, so it cannot hold "
            f"{with_article(type(dense).__name__)}. Use Flax's own cell, without sites inside."
        )
    bias = None if dense.bias is None else dense.bias[...]
    return dense.promote_dtype((x, dense.kernel[...], bias), dtype=dense.dtype)


def cell_params(params: Params, cell: nnx.RNNCellBase) -> dict[str, Any]:
    """Converts this library's weights to an NNX cell's variables, for `nnx.update`.

    Args:
      params: `LSTMParams`, `GRUParams`, or those of a linear cell.
      cell: a cell of this library, an `LSTMCell` or `GRUCell` of Flax, or `nnx.OptimizedLSTMCell`.

    Returns:
      A dict of arrays, named as each `nnx.Param` of the cell is.

    Raises:
      TypeError: if the cell is of another kind than the weights.
      ValueError: if the cell is of another size, or has no place for a `recurrent_bias`.

    Example:
      >>> from flax import nnx
      >>> import jax
      >>> import flax_dropout_cell as fdc
      >>> cell = fdc.nnx.LSTMCell(3, 8, rngs=nnx.Rngs(0))
      >>> params = fdc.init_lstm(jax.random.key(0), 3, 8)
      >>> nnx.update(cell, fdc.nnx.cell_params(params, cell))
      >>> bool((cell.dense_i.kernel[...] == params.input_kernel).all())
      True
    """
    if isinstance(cell, LinearCell):
        check_params(params, lambda _: cell.weights(), cell)
        return params._asdict()
    kind = _kind(cell)
    if not isinstance(params, kind):
        raise wrong_weights_error(cell, kind, params)
    _check_sizes("cell_params", params, cell)
    if isinstance(params, GRUParams):
        return _gru_variables(params, cell)
    if isinstance(cell, nnx.LSTMCell):
        return _gates_apart(params)
    return {
        "dense_i": {"kernel": params.input_kernel},
        "dense_h": {"kernel": params.recurrent_kernel, "bias": params.bias},
    }


def core_params(variables: Mapping[str, Any], cell: nnx.RNNCellBase) -> Params:
    """Converts an NNX cell's variables to this library's weights; undoes `cell_params`.

    Args:
      variables: `nnx.state(cell)`, or a dict of arrays of the same names.
      cell: a cell of this library, an `LSTMCell` or `GRUCell` of Flax, or `nnx.OptimizedLSTMCell`.

    Returns:
      `LSTMParams`, `GRUParams`, or those of a linear cell. Of a GRU without a second bias,
      `recurrent_bias` is None.
      `lstm_cell` and `gru_cell` have Flax's default activations, whatever the cell's are.

    Raises:
      TypeError: if `variables` is not a mapping, or `cell` is of a kind without such weights.
      ValueError: if the variables are not this cell's.

    Example:
      >>> from flax import nnx
      >>> import flax_dropout_cell as fdc
      >>> stock = nnx.LSTMCell(3, 8, rngs=nnx.Rngs(0))
      >>> params = fdc.nnx.core_params(nnx.state(stock), stock)
      >>> cell = fdc.nnx.LSTMCell(3, 8, rngs=nnx.Rngs(0))
      >>> nnx.update(cell, fdc.nnx.cell_params(params, cell))
      >>> cell.dense_i.kernel.shape
      (3, 32)
    """
    if isinstance(variables, nnx.State):
        variables = nnx.to_pure_dict(variables)
    if not isinstance(variables, Mapping):
        raise TypeError(must_be("variables", "nnx.state(cell), or a dict of arrays", variables))
    if isinstance(cell, LinearCell):
        return params_of(variables, lambda _: cell.weights(), cell)
    kind = _kind(cell)
    wanted = nnx.to_pure_dict(nnx.state(cell, nnx.Param))
    if not wanted.keys() <= variables.keys():
        raise wrong_variables_error(cell, wanted, variables)
    check_leaves(cell, flatten_dict(wanted, sep="/"), variables)
    params = _gates_of(variables, cell, kind)
    _check_sizes("core_params", without_stack(params), cell)
    return params


def _gates_of(
    variables: Mapping[str, Any], cell: nnx.RNNCellBase, kind: type
) -> LSTMParams | GRUParams:
    if kind is GRUParams:
        inputs, recurrent = variables["dense_i"], variables["dense_h"]["kernel"]
        bias = variables.get("recurrent_bias")
        return GRUParams(inputs["kernel"], recurrent, inputs["bias"], bias)
    if isinstance(cell, nnx.LSTMCell):
        return _gates_together(variables)
    recurrent = variables["dense_h"]
    return LSTMParams(variables["dense_i"]["kernel"], recurrent["kernel"], recurrent["bias"])


def _check_sizes(function: str, params: LSTMParams | GRUParams, cell: Any) -> None:
    """Raises if weights are not of the cell's size."""
    features = features_of(function, params)
    got = (params.input_kernel.shape[0], features)
    wanted: tuple[int, int] = (cell.in_features, cell.hidden_features)
    if got != wanted:
        raise ValueError(f"the cell has (in, hidden) features {wanted}, but the weights {got}.")


_INPUTS, _RECURRENT = ("ii", "if_", "ig", "io"), ("hi", "hf", "hg", "ho")
"""The names in `nnx.LSTMCell`, gate by gate."""


def _gates_apart(params: LSTMParams) -> dict[str, Any]:
    inputs = jnp.split(params.input_kernel, 4, -1)
    recurrent = jnp.split(params.recurrent_kernel, 4, -1)
    apart = {name: {"kernel": kernel} for name, kernel in zip(_INPUTS, inputs, strict=True)}
    for name, kernel, bias in zip(_RECURRENT, recurrent, jnp.split(params.bias, 4), strict=True):
        apart[name] = {"kernel": kernel, "bias": bias}
    return apart


def _gates_together(variables: Mapping[str, Any]) -> LSTMParams:
    def join(names: tuple[str, ...], leaf: str) -> jax.Array:
        return jnp.concatenate([variables[name][leaf] for name in names], -1)

    return LSTMParams(join(_INPUTS, "kernel"), join(_RECURRENT, "kernel"), join(_RECURRENT, "bias"))


def _gru_variables(params: GRUParams, cell: nnx.RNNCellBase) -> dict[str, Any]:
    variables: dict[str, Any] = {
        "dense_i": {"kernel": params.input_kernel, "bias": params.bias},
        "dense_h": {"kernel": params.recurrent_kernel},
    }
    bias = params.recurrent_bias
    if getattr(cell, "recurrent_bias", None) is not None:
        zeros = jnp.zeros_like(params.bias[: params.recurrent_kernel.shape[0]])
        variables["recurrent_bias"] = zeros if bias is None else bias
    elif bias is not None:
        raise ValueError(
            f"{type(cell).__name__} has no place for the weights' recurrent_bias: make it as "
            f"fdc.nnx.GRUCell(.., use_recurrent_bias=True), or give recurrent_bias=None."
        )
    return variables


def _kind(cell: nnx.RNNCellBase) -> type[LSTMParams] | type[GRUParams]:
    if isinstance(cell, nnx.LSTMCell | nnx.OptimizedLSTMCell):
        return LSTMParams
    if isinstance(cell, nnx.GRUCell):
        return GRUParams
    raise unknown_weights_error(cell)
