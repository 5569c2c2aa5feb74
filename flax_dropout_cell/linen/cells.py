"""This library's cells as linen cells, under the names that Flax gives their weights."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer

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
from .._messages import must_be
from ..cells.disturb import Disturb, undisturbed
from ..cells.gru import GRUParams, gru_step
from ..cells.lstm import LSTMParams, lstm_step
from .linear_cells import LinearCell

Params = LSTMParams | GRUParams | LinearParams


class _DenseParams(nn.Module):
    """Makes the weights that `nn.Dense` makes, and multiplies nothing."""

    shape: tuple[int, int]
    kernel_init: Initializer
    bias_init: Initializer | None
    param_dtype: Dtype

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array | None]:
        kernel = self.param("kernel", self.kernel_init, self.shape, self.param_dtype)
        if self.bias_init is None:
            return kernel, None
        return kernel, self.param("bias", self.bias_init, self.shape[1:], self.param_dtype)


class LSTMCell(nn.OptimizedLSTMCell):
    """`nn.LSTMCell` with sites inside: `lstm_cell` under Flax's names.

    Weights of `nn.LSTMCell` and `nn.OptimizedLSTMCell` load as they are, and `init` makes the
    same ones from the same key. In a compact method Flax names a cell by its class: write
    `name="OptimizedLSTMCell_0"` to load the weights of such a cell. It draws nothing of its own:
    noise at its sites comes from `RecurrentDropout(inside={site: ..})`; `fdc.lstm_cell` lists them.

    Args:
      features: the size of c and h. The other fields are those of `nn.OptimizedLSTMCell`:
        gate_fn, activation_fn, kernel_init, recurrent_kernel_init, bias_init, dtype,
        param_dtype, carry_init.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> cell, x = fdc.linen.LSTMCell(8), jnp.ones((4, 3))
      >>> carry = cell.initialize_carry(jax.random.key(0), x.shape)
      >>> variables = cell.init(jax.random.key(1), carry, x)
      >>> (c, h), y = cell.apply(variables, carry, x)
      >>> c.shape, y.shape
      ((4, 8), (4, 8))
    """

    @nn.compact
    def __call__(
        self, carry: Any, inputs: jax.Array, *, disturb: Disturb = undisturbed
    ) -> tuple[Any, jax.Array]:
        """One step.

        Args:
          carry: `(c, h)`, or `LSTMState(c, h)`, each `[*batch, features]`.
          inputs: `[*batch, in_features]`.
          disturb: called at each site inside.

        Returns:
          `(carry, y)`: the carry as it came; y is the new h.
        """
        in_features, features = jnp.shape(inputs)[-1], self.features
        # One after the other, as Flax makes them, because then the same key gives the same weights.
        kernels, recurrent_kernels, biases = [], [], []
        for gate in "ifgo":
            kernel, _ = _dense_params(self, f"i{gate}", in_features, self.kernel_init, None)
            kernels.append(kernel)
            kernel, bias = _dense_params(
                self, f"h{gate}", features, self.recurrent_kernel_init, self.bias_init
            )
            recurrent_kernels.append(kernel)
            biases.append(bias)
        weights = (jnp.concatenate(each, -1) for each in (kernels, recurrent_kernels, biases))
        x, *weights = promote_dtype(inputs, *weights, dtype=self.dtype)
        params = LSTMParams(*weights)
        return lstm_step(params, carry, x, disturb, self.gate_fn, self.activation_fn)


class GRUCell(nn.GRUCell):
    """`nn.GRUCell` with sites inside: `gru_cell` under Flax's names.

    Weights of `nn.GRUCell` load as they are, and `init` makes the same ones from the same key.
    It draws nothing of its own: noise at its sites comes from
    `RecurrentDropout(inside={site: ..})`; `fdc.gru_cell` lists them.

    Args:
      features: the size of h. The other fields are those of `nn.GRUCell`: gate_fn,
        activation_fn, kernel_init, recurrent_kernel_init, bias_init, dtype, param_dtype,
        carry_init.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> cell, x = fdc.linen.GRUCell(8), jnp.ones((4, 3))
      >>> carry = cell.initialize_carry(jax.random.key(0), x.shape)
      >>> variables = cell.init(jax.random.key(1), carry, x)
      >>> h, y = cell.apply(variables, carry, x)
      >>> y.shape
      (4, 8)
    """

    @nn.compact
    def __call__(
        self, carry: jax.Array, inputs: jax.Array, *, disturb: Disturb = undisturbed
    ) -> tuple[jax.Array, jax.Array]:
        """One step.

        Args:
          carry: h, `[*batch, features]`.
          inputs: `[*batch, in_features]`.
          disturb: called at each site inside.

        Returns:
          `(h, y)`: the new h, twice.
        """
        in_features, features = jnp.shape(inputs)[-1], self.features
        kernels, biases, recurrent_kernels, recurrent_bias = [], [], [], None
        for gate in "rzn":
            kernel, bias = _dense_params(
                self, f"i{gate}", in_features, self.kernel_init, self.bias_init
            )
            kernels.append(kernel)
            biases.append(bias)
            kernel, recurrent_bias = _dense_params(
                self,
                f"h{gate}",
                features,
                self.recurrent_kernel_init,
                self.bias_init if gate == "n" else None,
            )
            recurrent_kernels.append(kernel)
        weights = (jnp.concatenate(each, -1) for each in (kernels, recurrent_kernels, biases))
        x, *weights = promote_dtype(inputs, *weights, recurrent_bias, dtype=self.dtype)
        params = GRUParams(*weights)
        return gru_step(params, carry, x, disturb, self.gate_fn, self.activation_fn)


def _dense_params(
    cell: Any, name: str, fan_in: int, kernel_init: Initializer, bias_init: Initializer | None
) -> tuple[jax.Array, jax.Array | None]:
    shape = (fan_in, cell.features)
    return _DenseParams(shape, kernel_init, bias_init, cell.param_dtype, name=name)()


def cell_params(params: Params, cell: nn.RNNCellBase) -> dict[str, Any]:
    """Converts this library's weights to a linen cell's variables.

    Args:
      params: `LSTMParams`, `GRUParams`, or those of a linear cell.
      cell: a cell of this library, an `LSTMCell` or `GRUCell` of Flax, or `nn.OptimizedLSTMCell`.

    Returns:
      The variables, `{"params": {..}}`, for `cell.apply`.

    Raises:
      TypeError: if the cell is of another kind than the weights.
      ValueError: if the cell has another number of features.

    Example:
      >>> import flax.linen as nn
      >>> import jax
      >>> import flax_dropout_cell as fdc
      >>> params = fdc.init_lstm(jax.random.key(0), 3, 8)
      >>> variables = fdc.linen.cell_params(params, nn.LSTMCell(8))
      >>> variables["params"]["ii"]["kernel"].shape
      (3, 8)
    """
    if isinstance(cell, LinearCell):
        check_params(params, cell.shapes, cell)
        return {"params": params._asdict()}
    wanted = _kind(cell)
    if not isinstance(params, wanted):
        raise wrong_weights_error(cell, wanted, params)
    gates = "ifgo" if wanted is LSTMParams else "rzn"
    _check_features("cell_params", params, cell)
    inputs = jnp.split(params.input_kernel, len(gates), -1)
    recurrent = jnp.split(params.recurrent_kernel, len(gates), -1)
    found = {f"i{gate}": {"kernel": kernel} for gate, kernel in zip(gates, inputs, strict=True)}
    found |= {f"h{gate}": {"kernel": kernel} for gate, kernel in zip(gates, recurrent, strict=True)}
    side = "h" if wanted is LSTMParams else "i"
    for gate, bias in zip(gates, jnp.split(params.bias, len(gates)), strict=True):
        found[side + gate]["bias"] = bias
    if isinstance(params, GRUParams):
        bias = params.recurrent_bias
        found["hn"]["bias"] = jnp.zeros_like(params.bias[: cell.features]) if bias is None else bias
    return {"params": found}


def core_params(variables: Mapping[str, Any], cell: nn.RNNCellBase) -> Params:
    """Converts a linen cell's variables to this library's weights; undoes `cell_params`.

    Args:
      variables: the cell's variables, `{"params": {..}}`.
      cell: a cell of this library, an `LSTMCell` or `GRUCell` of Flax, or `nn.OptimizedLSTMCell`.

    Returns:
      `LSTMParams`, `GRUParams`, or those of a linear cell. `lstm_cell` and `gru_cell` have Flax's
      default activations, whatever the cell's are.

    Raises:
      TypeError: if `variables` is not a mapping, or `cell` is of a kind without such weights.
      ValueError: if the variables are not this cell's.

    Example:
      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> cell, h = nn.GRUCell(8), jnp.zeros((4, 8))
      >>> variables = cell.init(jax.random.key(0), h, jnp.ones((4, 3)))
      >>> params = fdc.linen.core_params(variables, cell)
      >>> params.input_kernel.shape, params.recurrent_bias.shape
      ((3, 24), (8,))
    """
    if not isinstance(variables, Mapping) or "params" not in variables:
        got = list(variables) if isinstance(variables, Mapping) else variables
        error = ValueError if isinstance(variables, Mapping) else TypeError
        raise error(must_be("variables", "{'params': ..}, as init gives them", got))
    params = nn.unbox(variables)["params"]
    if isinstance(cell, LinearCell):
        return params_of(params, cell.shapes, cell)
    kind = _kind(cell)
    gates = "ifgo" if kind is LSTMParams else "rzn"
    names = [side + gate for side in "ih" for gate in gates]
    if not set(names) <= set(params):
        raise wrong_variables_error(cell, names, params)
    with_bias = ["hi", "hf", "hg", "ho"] if kind is LSTMParams else ["ir", "iz", "in", "hn"]
    check_leaves(
        cell, [f"{name}/kernel" for name in names] + [f"{name}/bias" for name in with_bias], params
    )

    def join(side: str, leaf: str) -> jax.Array:
        return jnp.concatenate([params[side + gate][leaf] for gate in gates], axis=-1)

    kernels = join("i", "kernel"), join("h", "kernel")
    found: LSTMParams | GRUParams
    if kind is LSTMParams:
        found = LSTMParams(*kernels, join("h", "bias"))
    else:
        found = GRUParams(*kernels, join("i", "bias"), params["hn"]["bias"])
    _check_features("core_params", without_stack(found), cell)
    return found


def _check_features(function: str, params: LSTMParams | GRUParams, cell: Any) -> None:
    """Raises if weights do not fit together, or are not of the cell's size."""
    features = features_of(function, params)
    if features != cell.features:
        raise ValueError(f"the cell has {cell.features} features, but the weights {features}.")


def _kind(cell: nn.RNNCellBase) -> type[LSTMParams] | type[GRUParams]:
    if isinstance(cell, nn.LSTMCell | nn.OptimizedLSTMCell):
        return LSTMParams
    if isinstance(cell, nn.GRUCell):
        return GRUParams
    raise unknown_weights_error(cell)
