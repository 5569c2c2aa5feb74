"""The minGRU: its equations, its weights, and its sites inside."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .checks import check_call
from .disturb import Disturb, undisturbed
from .family import Family
from .linear import LINEAR_SITES, init_gates, read_gates, update


class MinGRUParams(NamedTuple):
    """A minGRU's weights. Gates are stored side by side in the order z, n.

    Attributes:
      input_kernel: `[in_features, 2 * features]`.
      bias: `[2 * features]`.
    """

    input_kernel: jax.Array
    bias: jax.Array


def init_min_gru(
    rng: jax.Array, in_features: int, features: int, dtype: Any = jnp.float32
) -> MinGRUParams:
    """Draws a minGRU's initial weights.

    Drawn once: the kernels are LeCun normal; the bias is zero.

    Args:
      rng: a key.
      in_features: the size of x.
      features: the size of h.
      dtype: of the weights.

    Returns:
      `MinGRUParams`.

    Raises:
      TypeError: if `rng` is not a key, a size is not an int, or `dtype` is not floating-point.
      ValueError: if a size is below 1.

    Example:
      >>> import jax
      >>> import flax_dropout_cell as fdc
      >>> params = fdc.init_min_gru(jax.random.key(0), 3, 8)
      >>> params.input_kernel.shape, params.bias.shape
      ((3, 16), (16,))
    """
    return MinGRUParams(*init_gates(rng, in_features, features, 2, dtype))


def min_gru_cell(
    params: MinGRUParams, carry: jax.Array, x: jax.Array, *, disturb: Disturb = undisturbed
) -> tuple[jax.Array, jax.Array]:
    """Runs one step of a minGRU, a GRU whose gates read x alone.

    Feng et al. 2024, arXiv:2410.01201, section 3.1: `z = sigmoid(x W_z + b_z)`, `n = x W_n + b_n`
    and `h' = (1 - z) h + z n`. Unlike in `gru_cell`, z is the share of the *new* value, as in that
    paper. It draws nothing; noise at `RecurrentDropout(inside={site: ..})` comes in through
    `disturb`, at these sites in order:

    - `candidate`: n, before z weighs it.
    - `hidden`: `h'`, emitted and carried on; `previous` is h.

    Args:
      params: `MinGRUParams`.
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
      >>> params = fdc.init_min_gru(jax.random.key(0), 3, 8)
      >>> h, y = fdc.min_gru_cell(params, jnp.zeros((4, 8)), jnp.ones((4, 3)))
      >>> y.shape
      (4, 8)
    """
    check_call("min_gru_cell", MinGRUParams, params, carry, x, 2)
    z, n = read_gates(x, params.input_kernel, params.bias, 2)
    n = disturb("candidate", n)
    z = jax.nn.sigmoid(z)  # of x alone: the scan computes it for all steps before it solves for h
    h = update(carry, 1 - z, z * n, disturb)
    return h, h


MIN_GRU = Family(
    "a minGRU",
    cell=min_gru_cell,
    sites=LINEAR_SITES,
    modules=("MinGRUCell",),
)
