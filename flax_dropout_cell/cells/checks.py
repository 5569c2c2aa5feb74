"""Checks of a cell's arguments: weights of its kind, and shapes and dtypes that fit together."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._arguments import check_count
from .._messages import short_repr, short_tree_repr
from .._random.keys import as_key


def check_init(rng: Any, in_features: Any, features: Any, dtype: Any) -> None:
    """Raises if weights cannot be drawn from these arguments."""
    as_key("rng", rng)
    check_count("in_features", in_features)
    check_count("features", features)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating-point one, got {jnp.dtype(dtype)}.")


def check_weights(cell: str, kind: type, params: Any) -> None:
    """Raises if a cell's weights are not of its own kind."""
    if not isinstance(params, kind):
        of_flax = "; for those of a Flax cell write fdc.linen.core_params(variables, cell)"
        got = f"{short_repr(params)}{of_flax if isinstance(params, dict) else ''}"
        raise TypeError(f"{cell} takes {kind.__name__}, got {got}.")


def check_call(cell: str, kind: type, params: Any, h: Any, x: Any, gates: int) -> int:
    """The features of a cell of gates; raises if weights, carry and input do not fit together."""
    check_weights(cell, kind, params)
    features = check_gates(cell, params, gates)
    check_input(cell, params.input_kernel, features, h, x)
    return features


def check_kernels(cell: str, params: Any, gates: int) -> int:
    """The features of h; raises if a kernel does not have a block of columns for each gate."""
    features = None
    if hasattr(params, "recurrent_kernel"):
        shape = list(np.shape(params.recurrent_kernel))
        if len(shape) != 2 or shape[1] != gates * shape[0]:
            wanted = f"[features, {gates} * features]"
            raise ValueError(f"{cell} takes a recurrent_kernel {wanted}, got {shape}.")
        features = shape[0]
    shape = list(np.shape(params.input_kernel))
    found = shape[1] // gates if len(shape) == 2 and shape[1] % gates == 0 else None
    if found is None or features not in (None, found):
        wanted = f"[in_features, {gates} * {'features' if features is None else features}]"
        raise ValueError(f"{cell} takes an input_kernel {wanted}, got {shape}.")
    return found


def check_gates(cell: str, params: Any, gates: int) -> int:
    """The features of h; raises if kernels or biases do not have a part for each gate."""
    features = check_kernels(cell, params, gates)
    check_vectors(cell, params, bias=gates * features)
    if getattr(params, "recurrent_bias", None) is not None:
        check_vectors(cell, params, recurrent_bias=features)
    return features


def check_vectors(cell: str, params: Any, **sizes: int) -> None:
    """Raises if a bias, or another vector of the weights, has another size: it would broadcast."""
    for name, size in sizes.items():
        vector = getattr(params, name)
        if vector is None or np.shape(vector) != (size,):
            got = None if vector is None else list(np.shape(vector))
            raise ValueError(f"{cell} takes a {name} {[size]}, got {got}.")


def check_input(
    cell: str, kernel: jax.Array, features: int, h: Any, x: Any, kind: Any = jnp.inexact
) -> None:
    """Raises if a cell's carry h and its input do not fit each other, or the input's kernel."""
    if not hasattr(h, "shape"):
        raise TypeError(f"{cell} takes the carry h as one array, got {short_tree_repr(h)}.")
    if not hasattr(x, "shape"):
        raise TypeError(f"{cell} takes x as one array, got {short_repr(x)}.")
    shape, got, reads = list(x.shape), f"{cell} got x {list(x.shape)}", list(kernel.shape)
    if shape[-1:] != reads[:1]:
        raise ValueError(f"{got}, but its input_kernel {reads} reads {reads[0]} features.")
    wanted = [*shape[:-1], features]
    if list(h.shape) != wanted:
        raise ValueError(f"{got} and h {list(h.shape)}; h must be {wanted}.")
    # An int would cut h to ints, in the cell or in the carry.
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"{cell} takes a floating-point x, got {x.dtype}: write x.astype(jnp.float32)."
        )
    check_carried(cell, "h", h, kind)


def check_carried(cell: str, name: str, value: jax.Array, kind: Any = jnp.inexact) -> None:
    """Raises if a part of the carry is not of the kind of dtype that a cell computes with."""
    if not jnp.issubdtype(value.dtype, kind):
        wanted = "floating-point" if kind is jnp.inexact else "complex"
        likely = "float32" if kind is jnp.inexact else "complex64"
        raise TypeError(f"{cell} carries a {wanted} {name}, such as {likely}, got {value.dtype}.")
