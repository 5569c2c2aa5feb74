"""The GRU: its equations, its weights, and its sites inside."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .checks import check_call
from .disturb import Disturb, has_noise, undisturbed
from .family import CellSite, Family
from .gates import Activation, add_bias, expand_bias, gates_matmul, init_kernels


class GRUParams(NamedTuple):
    """A GRU's weights. Gates are stored side by side in the order r, z, n.

    Attributes:
      input_kernel: `[in_features, 3 * features]`, multiplied with x.
      recurrent_kernel: `[features, 3 * features]`, multiplied with h.
      bias: `[3 * features]`.
      recurrent_bias: `[features]`, a second bias of n, which the reset gate scales along with
        what n reads of h; None for a GRU without, such as `nnx.GRUCell`.
    """

    input_kernel: jax.Array
    recurrent_kernel: jax.Array
    bias: jax.Array
    recurrent_bias: jax.Array | None


def init_gru(
    rng: jax.Array, in_features: int, features: int, dtype: Any = jnp.float32
) -> GRUParams:
    """Draws a GRU's initial weights, distributed as Flax's.

    Drawn once: input kernels LeCun normal, recurrent kernels orthogonal gate by gate; both biases
    are zero.

    Args:
      rng: a key.
      in_features: the size of x.
      features: the size of h.
      dtype: of the weights.

    Returns:
      `GRUParams`.

    Raises:
      TypeError: if `rng` is not a key, a size is not an int, or `dtype` is not floating-point.
      ValueError: if a size is below 1.

    Example:
      >>> import jax
      >>> import flax_dropout_cell as fdc
      >>> params = fdc.init_gru(jax.random.key(0), 3, 8)
      >>> params.input_kernel.shape, params.recurrent_bias.shape
      ((3, 24), (8,))
    """
    kernels = init_kernels(rng, in_features, features, 3, dtype)
    return GRUParams(*kernels, jnp.zeros(3 * features, dtype), jnp.zeros(features, dtype))


def gru_cell(
    params: GRUParams, carry: jax.Array, x: jax.Array, *, disturb: Disturb = undisturbed
) -> tuple[jax.Array, jax.Array]:
    """Runs one step of a GRU that has sites for noise inside.

    Cho et al. 2014, arXiv:1406.1078. The equations are those of `flax.linen.GRUCell`, PyTorch and
    cuDNN, with the reset after the product: `r = sigmoid(x W_r + b_r + h U_r)`, `z` likewise,
    `n = tanh(x W_n + b_n + r (h U_n + b'_n))` and `h' = (1 - z) n + z h`. It draws nothing; noise
    at `RecurrentDropout(inside={site: ..})` comes in through `disturb`, at these sites in order:

    - `recurrent`: h as all gates read it, `[*batch, features]`; not the h that z carries on.
    - `input_per_gate`, `recurrent_per_gate`: x and h as each gate reads them,
      `[*batch, 3, size]`.
    - `candidate`: n, after its tanh.
    - `hidden`: `h'`, emitted and carried on; `previous` is h.

    A step has two matrix products for x and two for h: one for r and z, and one for n, because the
    reset gate scales n's product with h. If a `*_per_gate` site has noise, each gate has its own.

    Args:
      params: `GRUParams`.
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
      >>> params = fdc.init_gru(jax.random.key(0), 3, 8)
      >>> h, y = fdc.gru_cell(params, jnp.zeros((4, 8)), jnp.ones((4, 3)))
      >>> y.shape
      (4, 8)
    """
    return gru_step(params, carry, x, disturb, jax.nn.sigmoid, jnp.tanh)


def gru_step(
    params: GRUParams,
    carry: jax.Array,
    x: jax.Array,
    disturb: Disturb,
    gate_fn: Activation,
    activation_fn: Activation,
) -> tuple[jax.Array, jax.Array]:
    """`gru_cell` with any activations; in Flax, these are fields of the cell."""
    h = carry
    check_call("gru_cell", GRUParams, params, h, x, 3)
    read_h = disturb("recurrent", h.astype(x.dtype))
    r, z, x_n, h_n = _read(params, x, read_h, disturb)
    if params.recurrent_bias is not None:
        h_n = h_n + expand_bias(params.recurrent_bias, h_n)
    n = disturb("candidate", activation_fn(x_n + gate_fn(r) * h_n))
    # A scan needs a carry that keeps its dtype, even if weights and inputs are narrower.
    z, n = gate_fn(z).astype(h.dtype), n.astype(h.dtype)
    new_h = disturb("hidden", (1 - z) * n + z * h, h)
    return new_h, new_h


def _read(params: GRUParams, x: jax.Array, h: jax.Array, disturb: Disturb) -> list[jax.Array]:
    """The sums for r and z, and n's products with x and with h, before the activations."""
    # Both are asked, so that whoever lists a cell's sites sees both.
    sites = [has_noise(disturb, site) for site in ("input_per_gate", "recurrent_per_gate")]
    if any(sites):
        of_x = gates_matmul(disturb, "input_per_gate", x, params.input_kernel, 3)
        of_h = gates_matmul(disturb, "recurrent_per_gate", h, params.recurrent_kernel, 3)
        (x_r, x_z, x_n), (h_r, h_z, h_n) = add_bias(of_x, params.bias), of_h
        return [x_r + h_r, x_z + h_z, x_n, h_n]
    # r and z need only the sum of their products with x and h, so both products share a cotangent,
    # which a loop keeps once. n does not: the reset gate scales its product with h alone, which
    # the gradient needs. So r and z are one product, and n is another.
    both = 2 * h.shape[-1]
    (x_kernel, x_kernel_n), (h_kernel, h_kernel_n), (bias, bias_n) = (
        jnp.split(weights, [both], axis=-1) for weights in params[:3]
    )
    gates = x @ x_kernel + h @ h_kernel
    r, z = jnp.split(gates + expand_bias(bias, gates), 2, axis=-1)
    x_n = x @ x_kernel_n
    return [r, z, x_n + expand_bias(bias_n, x_n), h @ h_kernel_n]


GRU = Family(
    "a GRU",
    cell=gru_cell,
    sites=(
        CellSite("recurrent"),
        CellSite("input_per_gate"),
        CellSite("recurrent_per_gate"),
        CellSite("candidate"),
        CellSite("hidden", carried=True, leaky=True),
    ),
    modules=("GRUCell",),
)

MGU = Family(
    "an MGU",
    cell=None,
    sites=(CellSite("hidden", carried=True, leaky=True),),
    modules=("MGUCell",),
)
