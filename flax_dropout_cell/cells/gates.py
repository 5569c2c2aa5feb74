"""Shared by the cells: the products of gates, initial weights, and checks of shapes."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from .._dtypes import wide_dtype
from .disturb import active

Disturb = Callable[..., Any]
"""`disturb(site, value, previous=None) -> value`."""

Activation = Callable[[jax.Array], jax.Array]


class Kernels(Protocol):
    """The two kernels of an LSTM's or a GRU's weights."""

    @property
    def input_kernel(self) -> jax.Array: ...

    @property
    def recurrent_kernel(self) -> jax.Array: ...


def gates_matmul(
    disturb: Disturb, site: str, value: jax.Array, kernel: jax.Array, gates: int
) -> list[jax.Array]:
    """Each gate's product with a value; if the site has noise, with a noisy copy for each gate."""
    if not active(disturb, site):  # one product for all gates, as in a cell without sites
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
    return [gate + row(part, gate) for gate, part in zip(gates, rows, strict=True)]


def row(bias: jax.Array, like: jax.Array) -> jax.Array:
    """A bias `[features]` with as many dims as a value, because rank promotion may be strict."""
    return bias.reshape((1,) * (like.ndim - 1) + (-1,))


def init_kernels(
    rng: jax.Array, in_features: int, features: int, gates: int, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Flax's initial weights: LeCun normal for inputs, an orthogonal matrix per gate for h."""
    lecun, orthogonal = jax.nn.initializers.lecun_normal(), jax.nn.initializers.orthogonal()
    keys = jax.random.split(rng, 2 * gates)
    wide = wide_dtype(dtype)  # because there is no QR in half precision
    inputs = [lecun(key, (in_features, features), dtype) for key in keys[:gates]]
    recurrent = [orthogonal(key, (features, features), wide) for key in keys[gates:]]
    return jnp.concatenate(inputs, -1), jnp.concatenate(recurrent, -1).astype(dtype)


def check_shapes(cell: str, params: Kernels, h: jax.Array, x: jax.Array, gates: int) -> None:
    """Raises if the shapes of weights, carry and input do not fit together."""
    recurrent = list(np.shape(params.recurrent_kernel))
    if len(recurrent) != 2 or recurrent[1] != gates * recurrent[0]:
        wanted = f"[features, {gates} * features]"
        raise ValueError(f"{cell} takes a recurrent_kernel {wanted}, got {recurrent}.")
    check_input(cell, params.input_kernel, gates, recurrent[0], h, x)


def check_input(
    cell: str, input_kernel: jax.Array, gates: int, features: int, h: jax.Array, x: jax.Array
) -> None:
    """Raises if a cell's carry h and its input do not fit each other, or the input's kernel."""
    if not hasattr(h, "shape"):
        raise TypeError(f"{cell} carries h alone, an array, got {type(h).__name__}.")
    kernel, got = list(np.shape(input_kernel)), f"{cell} got x {list(np.shape(x))}"
    if len(kernel) != 2 or kernel[1] != gates * features:
        wanted = f"[in_features, {gates} * {features}]"
        raise ValueError(f"{cell} takes an input_kernel {wanted}, got {kernel}.")
    if list(np.shape(x)[-1:]) != kernel[:1]:
        raise ValueError(f"{got}, but its input_kernel {kernel} reads {kernel[0]} features.")
    wanted = [*np.shape(x)[:-1], features]
    if list(np.shape(h)) != wanted:
        raise ValueError(f"{got} and h {list(np.shape(h))}; h must be {wanted}.")
