"""The RG-LRU, Griffin's recurrence: its equations, its weights, and its sites inside."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._dtypes import wide_dtype
from .checks import check_call, check_init, check_vectors
from .disturb import Disturb, undisturbed
from .family import Family
from .gates import expand_bias
from .linear import LINEAR_SITES, init_gates, read_gates, update

_POWER = 8.0
"""The paper's c: the decay is a**(c r), from 1 for a closed gate, r = 0, to a**c for an open."""


class RGLRUParams(NamedTuple):
    """An RG-LRU's weights. Gates are stored side by side in the order r, i, n.

    Attributes:
      input_kernel: `[in_features, 3 * features]`.
      bias: `[3 * features]`.
      decay_logit: `[features]`, the paper's Lambda: `a = sigmoid(decay_logit)`.
    """

    input_kernel: jax.Array
    bias: jax.Array
    decay_logit: jax.Array


def init_rg_lru(
    rng: jax.Array, in_features: int, features: int, dtype: Any = jnp.float32
) -> RGLRUParams:
    """Draws an RG-LRU's initial weights.

    De et al. 2024, arXiv:2402.19427, section 2.4. Drawn once: the kernels are LeCun normal, and
    `decay_logit` is such that `a**8`, the decay of an open recurrence gate, is uniform between 0.9
    and 0.999; the bias is zero.

    Args:
      rng: a key.
      in_features: the size of x.
      features: the size of h.
      dtype: of the weights.

    Returns:
      `RGLRUParams`.

    Raises:
      TypeError: if `rng` is not a key, a size is not an int, or `dtype` is not floating-point.
      ValueError: if a size is below 1.

    Example:
      >>> import jax
      >>> import flax_dropout_cell as fdc
      >>> params = fdc.init_rg_lru(jax.random.key(0), 3, 8)
      >>> params.input_kernel.shape, params.decay_logit.shape
      ((3, 24), (8,))
    """
    check_init(rng, in_features, features, dtype)
    gates_rng, decay_rng = jax.random.split(rng)
    wide = wide_dtype(dtype)
    decays = jax.random.uniform(decay_rng, (features,), wide, minval=0.9, maxval=0.999)
    log_a = jnp.log(decays) / _POWER
    logit = log_a - jnp.log(-jnp.expm1(log_a))
    kernel, bias = init_gates(gates_rng, in_features, features, 3, dtype)
    return RGLRUParams(kernel, bias, logit.astype(dtype))


def rg_lru_cell(
    params: RGLRUParams, carry: jax.Array, x: jax.Array, *, disturb: Disturb = undisturbed
) -> tuple[jax.Array, jax.Array]:
    """Runs one step of a Real-Gated Linear Recurrent Unit, the recurrence of Griffin.

    De et al. 2024, arXiv:2402.19427, equations 1 to 4: `r = sigmoid(x W_r + b_r)`, `i` likewise,
    `a_t = sigmoid(decay_logit)**(8 r)` and `h' = a_t h + sqrt(1 - a_t**2) (i n)`. There n is x
    itself; here it is `x W_n + b_n`, so x may have another size than h. It draws nothing; noise at
    `RecurrentDropout(inside={site: ..})` comes in through `disturb`, at these sites in order:

    - `candidate`: `i n`, the gated input, before `sqrt(1 - a_t**2)` weighs it.
    - `hidden`: `h'`, emitted and carried on; `previous` is h.

    Args:
      params: `RGLRUParams`.
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
      >>> params = fdc.init_rg_lru(jax.random.key(0), 3, 8)
      >>> h, y = fdc.rg_lru_cell(params, jnp.zeros((4, 8)), jnp.ones((4, 3)))
      >>> y.shape
      (4, 8)
    """
    features = check_call("rg_lru_cell", RGLRUParams, params, carry, x, 3)
    check_vectors("rg_lru_cell", params, decay_logit=features)
    r, i, n = read_gates(x, params.input_kernel, params.bias, 3)
    candidate = disturb("candidate", jax.nn.sigmoid(i) * n)
    decay, weight = _decay(params.decay_logit, r)
    h = update(carry, decay, weight.astype(candidate.dtype) * candidate, disturb)
    return h, h


def _decay(decay_logit: jax.Array, r: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`a_t` and `sqrt(1 - a_t**2)`, in float32 or wider: half precision rounds 0.999 to 1."""
    wide = wide_dtype(r.dtype)
    log_a = jax.nn.log_sigmoid(decay_logit.astype(wide))
    log_decay = _POWER * jax.nn.sigmoid(r.astype(wide)) * expand_bias(log_a, r)
    # A gate may be closed to the last bit; the slope of the square root is infinite at 0.
    rest = jnp.maximum(-jnp.expm1(2 * log_decay), jnp.finfo(wide).tiny)
    return jnp.exp(log_decay), jnp.sqrt(rest)


RG_LRU = Family(
    "an RG-LRU",
    cell=rg_lru_cell,
    sites=LINEAR_SITES,
    modules=("RGLRUCell",),
)
