"""The LRU: its equations, its weights, and its sites inside."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._arguments import Number
from .._dtypes import wide_dtype
from .checks import check_init, check_input, check_kernels, check_vectors, check_weights
from .disturb import Disturb, undisturbed
from .family import Family
from .gates import expand_bias
from .linear import LINEAR_SITES, update


class LRUParams(NamedTuple):
    """An LRU's weights, all real: the parts of a complex matrix are stored side by side.

    Attributes:
      nu_log: `[features]`; the eigenvalue is `exp(-exp(nu_log) + i exp(theta_log))`.
      theta_log: `[features]`, the logarithm of its phase.
      gamma_log: `[features]`, the logarithm of gamma, which scales the input to h.
      input_kernel: `[in_features, 2 * features]`, the real part of B, then the imaginary one.
      output_kernel: `[2 * features, features]`, which reads the real part of h, then the imaginary
        one; so its lower half is *minus* the imaginary part of C.
      skip_kernel: `[in_features, features]`, D, from x to the output, past the recurrence.
    """

    nu_log: jax.Array
    theta_log: jax.Array
    gamma_log: jax.Array
    input_kernel: jax.Array
    output_kernel: jax.Array
    skip_kernel: jax.Array


def init_lru(
    rng: jax.Array,
    in_features: int,
    features: int,
    dtype: Any = jnp.float32,
    *,
    min_radius: float = 0.0,
    max_radius: float = 1.0,
    max_phase: float = 2 * math.pi,
) -> LRUParams:
    """Draws an LRU's initial weights.

    Orvieto et al. 2023, arXiv:2303.06349, lemma 3.2 and section 3.4. Drawn once: eigenvalues are
    uniform on a ring of the complex plane, `min_radius <= |lambda| <= max_radius`, with phases
    below `max_phase`; B, C and D are normal, with variance 1 / (2 in_features) and 1 / features
    for each part of B and C, and 1 / in_features for D. (The paper's D is diagonal, with variance
    1; a matrix allows another number of features than x has.) Gamma is not random: it is
    `sqrt(1 - |lambda|**2)`, with which h has the variance of B x for white noise x.

    Args:
      rng: a key.
      in_features: the size of x.
      features: the size of h and of y.
      dtype: of the weights.
      min_radius: at least 0. For long memories the paper takes up to 0.999.
      max_radius: at most 1.
      max_phase: in radians. For very long sequences the paper takes pi / 10 or pi / 50.

    Returns:
      `LRUParams`.

    Raises:
      TypeError: if `rng` is not a key, a size is not an int, or `dtype` is not floating-point.
      ValueError: if a size is below 1, or the radii or the phase are out of range.

    Example:
      >>> import jax
      >>> import flax_dropout_cell as fdc
      >>> params = fdc.init_lru(jax.random.key(0), 3, 8)
      >>> params.nu_log.shape, params.input_kernel.shape, params.output_kernel.shape
      ((8,), (3, 16), (16, 8))
    """
    check_init(rng, in_features, features, dtype)
    _check_ring(min_radius, max_radius, max_phase)
    # In float32, because exponents and logarithms near a radius of 1 cancel in half precision.
    wide = wide_dtype(dtype)
    radii, phases, b, c, d = jax.random.split(rng, 5)
    uniform = functools.partial(jax.random.uniform, minval=2.0**-24)  # log(0) is not finite
    # 1 - |lambda|**2, because near a radius of 1 the square itself would round to 1.
    least, most = 1 - max_radius**2, 1 - min_radius**2
    gap = least + (most - least) * (1 - uniform(radii, (features,), wide))
    gap = jnp.minimum(gap, 1 - 2.0**-24)  # an eigenvalue of 0 has no logarithm
    nu = -jnp.log1p(-gap) / 2
    theta = max_phase * uniform(phases, (features,), wide)
    gamma = jnp.sqrt(gap)

    def normal(rng: jax.Array, shape: tuple[int, int], variance: float) -> jax.Array:
        return jax.random.normal(rng, shape, wide) * math.sqrt(variance)

    params = LRUParams(
        nu_log=jnp.log(nu),
        theta_log=jnp.log(theta),
        gamma_log=jnp.log(gamma),
        input_kernel=normal(b, (in_features, 2 * features), 1 / (2 * in_features)),
        output_kernel=normal(c, (2 * features, features), 1 / features),
        skip_kernel=normal(d, (in_features, features), 1 / in_features),
    )
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def _check_ring(min_radius: Any, max_radius: Any, max_phase: Any) -> None:
    """Raises if numbers do not describe a ring; arrays, which may be traced, are not checked."""
    if isinstance(min_radius, Number) and isinstance(max_radius, Number):
        if not 0 <= min_radius <= max_radius <= 1 or min_radius == 1 or max_radius == 0:
            raise ValueError(
                f"an LRU needs 0 <= min_radius <= max_radius <= 1, min_radius below 1 and "
                f"max_radius above 0, got {min_radius} and {max_radius}."
            )
    if isinstance(max_phase, Number) and not 0 < max_phase < math.inf:
        raise ValueError(f"max_phase must be above 0 and finite, got {max_phase}.")


def lru_cell(
    params: LRUParams, carry: jax.Array, x: jax.Array, *, disturb: Disturb = undisturbed
) -> tuple[jax.Array, jax.Array]:
    """Runs one step of a Linear Recurrent Unit, whose state is complex and whose output is real.

    Orvieto et al. 2023, arXiv:2303.06349, equations 1 and 7: with
    `lambda = exp(-exp(nu_log) + i exp(theta_log))`, `h' = lambda h + gamma (x B)` and
    `y = Re(h' C) + x D`. It draws nothing; noise at `RecurrentDropout(inside={site: ..})` comes in
    through `disturb`, at these sites in order:

    - `candidate`: `x B`, complex, before gamma weighs it.
    - `hidden`: `h'`, complex, read by C and carried on; `previous` is h.

    A mask is one number for both parts of a complex unit. Any nonlinearity comes after the layer,
    as in the paper.

    Args:
      params: `LRUParams`.
      carry: h, complex, `[*batch, features]`, with any number of batch dims.
      x: `[*batch, in_features]`.
      disturb: called at each site, `disturb(site, value, previous=None) -> value`.

    Returns:
      `(h, y)`: the new h with the dtype of the old, and the real y, `[*batch, features]`, in the
      dtype of `x @ skip_kernel`.

    Raises:
      TypeError: if the carry is not a complex array, x is not floating-point, or the weights are
        another cell's.
      ValueError: if the shapes of weights, carry and x do not fit together.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> params = fdc.init_lru(jax.random.key(0), 3, 8)
      >>> h, y = fdc.lru_cell(params, jnp.zeros((4, 8), jnp.complex64), jnp.ones((4, 3)))
      >>> h.dtype, y.dtype, y.shape
      (dtype('complex64'), dtype('float32'), (4, 8))
    """
    check_weights("lru_cell", LRUParams, params)
    features = check_kernels("lru_cell", params, 2)
    check_input("lru_cell", params.input_kernel, features, carry, x, jnp.complexfloating)
    check_vectors("lru_cell", params, nu_log=features, theta_log=features, gamma_log=features)
    real = jnp.finfo(carry.dtype).dtype
    nu_log, theta_log, gamma_log = (leaf.astype(real) for leaf in params[:3])
    real_part, imag_part = jnp.split(x @ params.input_kernel, 2, axis=-1)
    read = jax.lax.complex(real_part.astype(real), imag_part.astype(real))
    candidate = disturb("candidate", read)
    gamma = expand_bias(jnp.exp(gamma_log), candidate).astype(carry.dtype)
    eigenvalues = jnp.exp(jax.lax.complex(-jnp.exp(nu_log), jnp.exp(theta_log)))
    h = update(carry, expand_bias(eigenvalues, carry), gamma * candidate, disturb)
    parts = jnp.concatenate([h.real, h.imag], axis=-1).astype(x.dtype)
    return h, parts @ params.output_kernel + x @ params.skip_kernel


LRU = Family(
    "an LRU",
    cell=lru_cell,
    sites=LINEAR_SITES,
    modules=("LRUCell",),
)
