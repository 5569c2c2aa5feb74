"""The LSTM: its equations, its weights, and its sites inside."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._messages import short_tree_repr
from .checks import check_call, check_carried
from .disturb import Disturb, has_noise, undisturbed
from .family import CellSite, Family
from .gates import Activation, add_bias, expand_bias, gates_matmul, init_kernels


class LSTMParams(NamedTuple):
    """An LSTM's weights. Gates are stored side by side in the order i, f, g, o.

    Attributes:
      input_kernel: `[in_features, 4 * features]`, multiplied with x.
      recurrent_kernel: `[features, 4 * features]`, multiplied with h.
      bias: `[4 * features]`.
    """

    input_kernel: jax.Array
    recurrent_kernel: jax.Array
    bias: jax.Array


class LSTMState(NamedTuple):
    """An LSTM's carry, in Flax's order; a plain `(c, h)` works too.

    Attributes:
      c: the cell state, or memory, `[*batch, features]`.
      h: the last output, `[*batch, features]`.
    """

    c: Any
    h: Any


def init_lstm(
    rng: jax.Array, in_features: int, features: int, dtype: Any = jnp.float32
) -> LSTMParams:
    """Draws an LSTM's initial weights, distributed as Flax's.

    Drawn once: input kernels LeCun normal, recurrent kernels orthogonal gate by gate; the bias is
    zero.

    Args:
      rng: a key.
      in_features: the size of x.
      features: the size of c and h.
      dtype: of the weights.

    Returns:
      `LSTMParams`.

    Raises:
      TypeError: if `rng` is not a key, a size is not an int, or `dtype` is not floating-point.
      ValueError: if a size is below 1.

    Example:
      >>> import jax
      >>> import flax_dropout_cell as fdc
      >>> params = fdc.init_lstm(jax.random.key(0), 3, 8)
      >>> jax.tree.map(lambda leaf: leaf.shape, params)
      LSTMParams(input_kernel=(3, 32), recurrent_kernel=(8, 32), bias=(32,))
    """
    kernels = init_kernels(rng, in_features, features, 4, dtype)
    return LSTMParams(*kernels, jnp.zeros(4 * features, dtype))


def lstm_cell(
    params: LSTMParams, carry: Any, x: jax.Array, *, disturb: Disturb = undisturbed
) -> tuple[Any, jax.Array]:
    """Runs one step of an LSTM that has sites for noise inside.

    Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000. The equations are
    those of `flax.linen.LSTMCell`: with `(i, f, g, o) = x W + h U + b`,
    `c' = sigmoid(f) c + sigmoid(i) tanh(g)` and `h' = sigmoid(o) tanh(c')`. It draws nothing; noise
    at `RecurrentDropout(inside={site: ..})` comes in through `disturb`, at these sites in order:

    - `recurrent`: h as all gates read it, `[*batch, features]`.
    - `input_per_gate`, `recurrent_per_gate`: x and h as each gate reads them,
      `[*batch, 4, size]`.
    - `candidate`: `tanh(g)`.
    - `memory`: `c'`, before the output gate reads it, and carried on; `previous` is c.
    - `hidden`: `h'`, emitted and carried on; `previous` is h.

    A step has one matrix product for x and one for h. If a `*_per_gate` site has noise, each gate
    has its own.

    Args:
      params: `LSTMParams`.
      carry: `LSTMState(c, h)` or a plain `(c, h)`, each `[*batch, features]`, with any number of
        batch dims.
      x: `[*batch, in_features]`.
      disturb: called at each site, `disturb(site, value, previous=None) -> value`.

    Returns:
      `(carry, y)`: the carry as it came, LSTMState or tuple, with its dtypes; y is the new h.

    Raises:
      TypeError: if the carry is not a `(c, h)` of floating-point arrays, x is not one, or the
        weights are another cell's.
      ValueError: if the shapes of weights, carry and x do not fit together.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> params = fdc.init_lstm(jax.random.key(0), 3, 8)
      >>> carry = fdc.LSTMState(c=jnp.zeros((4, 8)), h=jnp.zeros((4, 8)))
      >>> carry, y = fdc.lstm_cell(params, carry, jnp.ones((4, 3)))
      >>> carry.c.shape, y.shape
      ((4, 8), (4, 8))
    """
    return lstm_step(params, carry, x, disturb, jax.nn.sigmoid, jnp.tanh)


def lstm_step(
    params: LSTMParams,
    carry: Any,
    x: jax.Array,
    disturb: Disturb,
    gate_fn: Activation,
    activation_fn: Activation,
) -> tuple[Any, jax.Array]:
    """`lstm_cell` with any activations; in Flax, these are fields of the cell."""
    c, h = _check_carry(carry)
    check_call("lstm_cell", LSTMParams, params, h, x, 4)
    check_carried("lstm_cell", "c", c)
    i, f, g, o = _read(params, x, h.astype(x.dtype), disturb)
    g = disturb("candidate", activation_fn(g))
    # A scan needs a carry that keeps its dtype, even if weights and inputs are narrower.
    i, f, g = (part.astype(c.dtype) for part in (gate_fn(i), gate_fn(f), g))
    new_c = disturb("memory", f * c + i * g, c)
    new_h = (gate_fn(o).astype(c.dtype) * activation_fn(new_c)).astype(h.dtype)
    new_h = disturb("hidden", new_h, h)
    new = (new_c, new_h)
    return LSTMState(*new) if isinstance(carry, LSTMState) else type(carry)(new), new_h


def _read(params: LSTMParams, x: jax.Array, h: jax.Array, disturb: Disturb) -> list[jax.Array]:
    """The sums of the four gates, before their activations."""
    h = disturb("recurrent", h)
    # Both are asked, so that whoever lists a cell's sites sees both.
    sites = [has_noise(disturb, site) for site in ("input_per_gate", "recurrent_per_gate")]
    if any(sites):
        of_x = gates_matmul(disturb, "input_per_gate", x, params.input_kernel, 4)
        of_h = gates_matmul(disturb, "recurrent_per_gate", h, params.recurrent_kernel, 4)
        return add_bias([a + b for a, b in zip(of_x, of_h, strict=True)], params.bias)
    # Not one product of [x, h]: its gradient would include that of x, wanted or not. The bias is in
    # the same sum, so that the gradients of all three weights, computed after the loop, need one
    # stored cotangent.
    read = x @ params.input_kernel + h @ params.recurrent_kernel
    return jnp.split(read + expand_bias(params.bias, read), 4, axis=-1)


def _check_carry(carry: Any) -> tuple[jax.Array, jax.Array]:
    if isinstance(carry, LSTMState) or (type(carry) in (tuple, list) and len(carry) == 2):
        c, h = carry
        if np.shape(c) == np.shape(h):
            return c, h
        got = f"{list(np.shape(c))} and {list(np.shape(h))}"
        raise ValueError(f"lstm_cell takes c and h of one shape, got {got}.")
    # Another NamedTuple may well hold (h, c), as Haiku's LSTMState(hidden, cell) does.
    raise TypeError(
        f"lstm_cell takes the carry fdc.LSTMState(c=.., h=..) or a plain (c, h), got "
        f"{short_tree_repr(carry)}."
    )


LSTM = Family(
    "an LSTM",
    cell=lstm_cell,
    sites=(
        CellSite("recurrent"),
        CellSite("input_per_gate"),
        CellSite("recurrent_per_gate"),
        CellSite("candidate"),
        CellSite("memory", carried=True, leaky=True),
        CellSite("hidden", carried=True),
    ),
    modules=("LSTMCell", "OptimizedLSTMCell", "ConvLSTMCell"),
)
