"""Shared by the linear cells: gates that read x alone, the update, and initial weights.

In a linear cell nothing reads h: a step is `h' = a * h + b`, unit by unit, with `a` and `b` made of
x. Keep it that way: compute everything that needs x first, and then only multiply h, add to it or
select from it. A scan can then run all steps in parallel.
"""

from typing import Any

import jax
import jax.numpy as jnp

from .checks import check_init
from .disturb import Disturb
from .family import CellSite
from .gates import expand_bias

LINEAR_SITES = (CellSite("candidate"), CellSite("hidden", carried=True, leaky=True))


def read_gates(x: jax.Array, kernel: jax.Array, bias: jax.Array, gates: int) -> list[jax.Array]:
    """Each gate's product with x, from one matrix product."""
    read = x @ kernel
    return jnp.split(read + expand_bias(bias, read), gates, axis=-1)


def update(h: jax.Array, decay: jax.Array, new: jax.Array, disturb: Disturb) -> jax.Array:
    """`decay * h + new`, with the noise of the `hidden` site; the carry keeps its dtype."""
    # Written as one product and one sum, which a scan recognizes as a linear recurrence.
    return disturb("hidden", decay.astype(h.dtype) * h + new.astype(h.dtype), h)


def init_gates(
    rng: jax.Array, in_features: int, features: int, gates: int, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """LeCun normal kernels, side by side, and a bias of zeros."""
    check_init(rng, in_features, features, dtype)
    lecun, keys = jax.nn.initializers.lecun_normal(), jax.random.split(rng, gates)
    kernels = [lecun(key, (in_features, features), dtype) for key in keys]
    return jnp.concatenate(kernels, axis=-1), jnp.zeros(gates * features, dtype)
