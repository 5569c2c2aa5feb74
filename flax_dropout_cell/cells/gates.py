"""What the LSTM and the GRU share: how gates read a value, first weights, and the checks."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from .._inside import active

Disturb = Callable[..., Any]
"""`disturb(site, value, previous=None) -> value`."""

Activation = Callable[[jax.Array], jax.Array]


class Kernels(Protocol):
    """The two kernels that every cell's weights have."""

    @property
    def input_kernel(self) -> jax.Array: ...

    @property
    def recurrent_kernel(self) -> jax.Array: ...


def copy_per_gate(disturb: Disturb, site: str, value: jax.Array, gates: int) -> jax.Array:
    """A value as each gate reads it, `[*batch, gates, features]`: a copy for each to disturb."""
    shape = (*value.shape[:-1], gates, value.shape[-1])
    copies = jnp.broadcast_to(value[..., None, :], shape)
    return disturb(site, copies) if active(disturb, site) else copies


def read_together(value: jax.Array, kernel: jax.Array, gates: int) -> list[jax.Array]:
    """One product: all gates read one value."""
    return jnp.split(value @ kernel, gates, axis=-1)


def read_apart(
    copies: Sequence[jax.Array], kernels: Sequence[jax.Array], gates: int
) -> list[jax.Array]:
    """One batched product: each gate reads its own copy of each value, with that value's kernel."""
    # Gates lead, where a batched product wants them and where they are cut without a copy. So they
    # do in the kernels' gradient, which a loop adds up at each step: it is added as it comes. Of
    # kernels that are split and stacked it would be cut up and put together first.
    rows = jnp.concatenate([jnp.moveaxis(each, -2, 0) for each in copies], axis=-1)
    if len(kernels) == 1:
        # XLA takes a concatenation out of a loop, and leaves a transposition alone in it.
        half = kernels[0].shape[0] // 2
        kernels = kernels[0][:half], kernels[0][half:]
    per_gate = jnp.concatenate([_gates_first(kernel, gates) for kernel in kernels], axis=1)
    return list(jnp.unstack(jnp.einsum("g...d,gdh->g...h", rows, per_gate)))


def _gates_first(kernel: jax.Array, gates: int) -> jax.Array:
    """A kernel `[inputs, gates * features]` as `[gates, inputs, features]`."""
    features = kernel.shape[1] // gates
    return jnp.moveaxis(kernel.reshape(kernel.shape[0], gates, features), 1, 0)


def add_bias(gates: list[jax.Array], bias: jax.Array) -> list[jax.Array]:
    """Adds each gate's part of a bias `[gates * features]`."""
    rows = jnp.split(bias, len(gates))
    return [gate + row(part, gate) for gate, part in zip(gates, rows, strict=True)]


def row(bias: jax.Array, like: jax.Array) -> jax.Array:
    """A bias `[features]` with as many dims as a value, for strict rank promotion."""
    return bias.reshape((1,) * (like.ndim - 1) + (-1,))


def init_kernels(
    rng: jax.Array, in_features: int, features: int, gates: int, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Flax's first weights: LeCun normal for inputs, an orthogonal matrix per gate for h."""
    lecun, orthogonal = jax.nn.initializers.lecun_normal(), jax.nn.initializers.orthogonal()
    keys = jax.random.split(rng, 2 * gates)
    # Orthogonal matrices are computed in float32, for there is no QR in half precision.
    wide = dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32
    inputs = [lecun(key, (in_features, features), dtype) for key in keys[:gates]]
    recurrent = [orthogonal(key, (features, features), wide) for key in keys[gates:]]
    return jnp.concatenate(inputs, -1), jnp.concatenate(recurrent, -1).astype(dtype)


def check_shapes(cell: str, params: Kernels, h: jax.Array, x: jax.Array, gates: int) -> None:
    """Refuses weights, a carry and an input that do not fit together."""
    inputs, recurrent = np.shape(params.input_kernel), np.shape(params.recurrent_kernel)
    if len(recurrent) != 2 or recurrent[1] != gates * recurrent[0]:
        raise ValueError(
            f"{cell} wants a recurrent_kernel [features, {gates} * features], "
            f"got {list(recurrent)}."
        )
    if len(inputs) != 2 or inputs[1] != recurrent[1]:
        raise ValueError(
            f"{cell} wants an input_kernel [in_features, {recurrent[1]}] beside a "
            f"recurrent_kernel {list(recurrent)}, got {list(inputs)}."
        )
    if np.shape(x)[-1:] != inputs[:1]:
        raise ValueError(
            f"{cell} got x {list(np.shape(x))}, but its input_kernel {list(inputs)} reads "
            f"{inputs[0]} features."
        )
    if np.shape(h) != (*np.shape(x)[:-1], recurrent[0]):
        raise ValueError(
            f"{cell} got x {list(np.shape(x))} and h {list(np.shape(h))}; h must be "
            f"{[*np.shape(x)[:-1], recurrent[0]]}."
        )
