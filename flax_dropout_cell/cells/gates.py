"""Shared by the cells: the products of gates, and initial weights."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._dtypes import wide_dtype
from .checks import check_init
from .disturb import Disturb, has_noise

Activation = Callable[[jax.Array], jax.Array]


def gates_matmul(
    disturb: Disturb, site: str, value: jax.Array, kernel: jax.Array, gates: int
) -> list[jax.Array]:
    """Each gate's product with a value; if the site has noise, with a noisy copy for each gate."""
    if not has_noise(disturb, site):  # one product for all gates, as in a cell without sites
        return jnp.split(value @ kernel, gates, axis=-1)
    shape = (*value.shape[:-1], gates, value.shape[-1])
    copies = disturb(site, jnp.broadcast_to(value[..., None, :], shape))
    # A product per gate beats one product that is batched over the gates: on a CPU, XLA takes up
    # to twice as long for that, and its gradient would transpose its operands after the loop.
    parts = jnp.split(kernel, gates, axis=-1)
    return [copies[..., gate, :] @ part for gate, part in enumerate(parts)]


def add_bias(gates: list[jax.Array], bias: jax.Array) -> list[jax.Array]:
    """Adds each gate's part of a bias `[gates * features]`."""
    rows = jnp.split(bias, len(gates))
    return [gate + expand_bias(part, gate) for gate, part in zip(gates, rows, strict=True)]


def expand_bias(bias: jax.Array, like: jax.Array) -> jax.Array:
    """A bias `[features]` with as many dims as a value, because rank promotion may be strict."""
    return bias.reshape((1,) * (like.ndim - 1) + (-1,))


def init_kernels(
    rng: jax.Array, in_features: int, features: int, gates: int, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Flax's initial weights: LeCun normal for inputs, an orthogonal matrix per gate for h."""
    check_init(rng, in_features, features, dtype)
    lecun, orthogonal = jax.nn.initializers.lecun_normal(), jax.nn.initializers.orthogonal()
    keys = jax.random.split(rng, 2 * gates)
    wide = wide_dtype(dtype)  # because there is no QR in half precision
    inputs = [lecun(key, (in_features, features), dtype) for key in keys[:gates]]
    recurrent = [orthogonal(key, (features, features), wide) for key in keys[gates:]]
    return jnp.concatenate(inputs, -1), jnp.concatenate(recurrent, -1).astype(dtype)
