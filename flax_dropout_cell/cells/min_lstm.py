"""The minLSTM: its equations, its weights, and its sites inside."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .checks import check_call
from .disturb import Disturb, undisturbed
from .family import Family
from .linear import LINEAR_SITES, init_gates, read_gates, update


class MinLSTMParams(NamedTuple):
    """A minLSTM's weights. Gates are stored side by side in the order f, i, n.

    Attributes:
      input_kernel: `[in_features, 3 * features]`.
      bias: `[3 * features]`.
    """

    input_kernel: jax.Array
    bias: jax.Array


def init_min_lstm(
    rng: jax.Array, in_features: int, features: int, dtype: Any = jnp.float32
) -> MinLSTMParams:
    """Draws a minLSTM's initial weights.

    Drawn once: the kernels are LeCun normal; the bias is zero.

    Args:
      rng: a key.
      in_features: the size of x.
      features: the size of h.
      dtype: of the weights.

    Returns:
      `MinLSTMParams`.

    Raises:
      TypeError: if `rng` is not a key, a size is not an int, or `dtype` is not floating-point.
      ValueError: if a size is below 1.

    Example:
      >>> import jax
      >>> import flax_dropout_cell as fdc
      >>> params = fdc.init_min_lstm(jax.random.key(0), 3, 8)
      >>> params.input_kernel.shape, params.bias.shape
      ((3, 24), (24,))
    """
    return MinLSTMParams(*init_gates(rng, in_features, features, 3, dtype))


def min_lstm_cell(
    params: MinLSTMParams, carry: jax.Array, x: jax.Array, *, disturb: Disturb = undisturbed
) -> tuple[jax.Array, jax.Array]:
    """Runs one step of a minLSTM, an LSTM without output gate whose gates read x alone.

    Feng et al. 2024, arXiv:2410.01201, section 3.2: `f = sigmoid(x W_f + b_f)`, `i` likewise,
    `n = x W_n + b_n` and `h' = (f h + i n) / (f + i)`. It carries h alone, no c. It draws nothing;
    noise at `RecurrentDropout(inside={site: ..})` comes in through `disturb`, at these sites in
    order:

    - `candidate`: n, before the gates weigh it.
    - `hidden`: `h'`, emitted and carried on; `previous` is h.

    Args:
      params: `MinLSTMParams`.
      carry: h, `[*batch, features]`, with any number of batch dims.
      x: `[*batch, in_features]`.
      disturb: called at each site, `disturb(site, value, previous=None) -> value`.

    Returns:
      `(h, y)`: the new h, twice, with the dtype of the old.

    Raises:
      TypeError: if the carry or x is not a floating-point array, or the weights are another cell's.
      ValueError: if the shapes of weights, carry and x do not fit together.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> params = fdc.init_min_lstm(jax.random.key(0), 3, 8)
      >>> h, y = fdc.min_lstm_cell(params, jnp.zeros((4, 8)), jnp.ones((4, 3)))
      >>> y.shape
      (4, 8)
    """
    check_call("min_lstm_cell", MinLSTMParams, params, carry, x, 3)
    f, i, n = read_gates(x, params.input_kernel, params.bias, 3)
    n = disturb("candidate", n)
    # f / (f + i) is the sigmoid of log f - log i, which does not divide 0 by 0 if both underflow.
    balance = jax.nn.log_sigmoid(f) - jax.nn.log_sigmoid(i)
    h = update(carry, jax.nn.sigmoid(balance), jax.nn.sigmoid(-balance) * n, disturb)
    return h, h


MIN_LSTM = Family(
    "a minLSTM",
    cell=min_lstm_cell,
    sites=LINEAR_SITES,
    modules=("MinLSTMCell",),
)
