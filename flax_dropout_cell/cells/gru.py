"""The GRU: its equations, its weights, and its sites inside."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._inside import active, undisturbed
from .gates import (
    Activation,
    Disturb,
    add_bias,
    check_shapes,
    copy_per_gate,
    init_kernels,
    read_apart,
    read_together,
    row,
)


class GRUParams(NamedTuple):
    """A GRU's weights. Gates stand side by side in the order r, z, n.

    Attributes:
      input_kernel: `[in_features, 3 * features]`, what the gates read x with.
      recurrent_kernel: `[features, 3 * features]`, what they read h with.
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

    The equations are those of `flax.linen.GRUCell`, PyTorch and cuDNN, with the reset after the
    product: `r = sigmoid(x W_r + b_r + h U_r)`, `z` likewise,
    `n = tanh(x W_n + b_n + r (h U_n + b'_n))` and `h' = (1 - z) n + z h`. It draws nothing; noise
    at `RecurrentDropout(inside={site: ..})` comes in through `disturb`, at these sites in order:

    - `recurrent`: h as all gates read it, `[*batch, features]`; not the h that z carries on.
    - `input_per_gate`, `recurrent_per_gate`: x and h as each gate reads them,
      `[*batch, 3, size]`.
    - `candidate`: n, after its tanh.
    - `hidden`: `h'`, emitted and carried on; `previous` is h.

    A step is one matrix product for x and one for h, for the reset gate stands between the two;
    each is batched over the gates where its `*_per_gate` site has noise.

    Args:
      params: `GRUParams`.
      carry: h, `[*batch, features]`, with any number of batch dims.
      x: `[*batch, in_features]`.
      disturb: what is called at each site, `disturb(site, value, previous=None) -> value`.

    Returns:
      `(h, y)`: the new h, twice, with the dtype of the old.

    Raises:
      TypeError: the carry is no array.
      ValueError: the shapes of weights, carry and x do not fit together.

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
    """`gru_cell` with any activations, as Flax's cells have them."""
    if not hasattr(carry, "shape"):
        raise TypeError(f"gru_cell carries h alone, an array, got {type(carry).__name__}.")
    h = carry
    check_shapes("gru_cell", params, h, x, 3)
    read_h = disturb("recurrent", h.astype(x.dtype))
    of_x = _read("input_per_gate", x, params.input_kernel, disturb)
    of_h = _read("recurrent_per_gate", read_h, params.recurrent_kernel, disturb)
    x_r, x_z, x_n = add_bias(of_x, params.bias)
    h_r, h_z, h_n = of_h
    if params.recurrent_bias is not None:
        h_n = h_n + row(params.recurrent_bias, h_n)
    n = disturb("candidate", activation_fn(x_n + gate_fn(x_r + h_r) * h_n))
    # The carry keeps its dtype, as a scan needs, where weights and inputs are narrower.
    z, n = gate_fn(x_z + h_z).astype(h.dtype), n.astype(h.dtype)
    new_h = disturb("hidden", (1 - z) * n + z * h, h)
    return new_h, new_h


def _read(site: str, value: jax.Array, kernel: jax.Array, disturb: Disturb) -> list[jax.Array]:
    """What the three gates read of x, or of h."""
    if active(disturb, site):
        return read_apart([copy_per_gate(disturb, site, value, 3)], [kernel], 3)
    return read_together(value, kernel, 3)
