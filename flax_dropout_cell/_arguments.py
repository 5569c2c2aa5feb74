"""Checks of arguments that any function may take: a flag, a count, ints."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._compat import is_traced
from ._messages import must_be

Number = int | float | np.integer | np.floating
"""A value that is known on the host, so it can be checked and can pick an algorithm."""


def check_flag(name: str, flag: Any) -> bool:
    """The flag as a bool; raises if it is not one: Python takes most other objects for True."""
    traced = is_traced(flag)
    is_bool = isinstance(flag, bool | np.bool_)
    if isinstance(flag, jax.Array | np.ndarray) and not traced:
        is_bool = flag.dtype == bool and flag.shape == ()
    if is_bool:
        return bool(flag)
    known = ", known when the program is traced (a static argument of jax.jit)" if traced else ""
    raise TypeError(must_be(name, f"True or False{known}", flag))


def check_count(name: str, count: Any) -> int:
    """The count as an int; raises if it is not an int of at least 1."""
    is_int = isinstance(count, int | np.integer) and not isinstance(count, bool)
    if not is_int or count < 1:
        error = ValueError if is_int else TypeError
        raise error(must_be(name, "an int of at least 1", count))
    return int(count)


def as_ints(name: str, value: Any) -> jax.Array | np.ndarray:
    """Ints as an array, which stays in NumPy if it lies there: JAX would truncate it to 32 bits."""
    leaves = jax.tree.leaves(value)  # a list of ints too
    on_host = all(isinstance(leaf, int | np.ndarray | np.generic) for leaf in leaves)
    if any(isinstance(leaf, str) for leaf in leaves):
        raise TypeError(must_be(name, "ints", value))
    array = np.asarray(value) if on_host else jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must be ints, got {array.dtype}.")
    return array
