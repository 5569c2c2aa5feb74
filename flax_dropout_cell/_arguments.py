"""Checks of arguments that any function may take: a flag, a count, ints."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._messages import must_be


def check_flag(name: str, flag: Any) -> bool:
    """The flag as a bool; raises if it is anything else, most of which Python takes for True."""
    if isinstance(flag, bool | np.bool_):
        return bool(flag)
    wanted = "True or False"
    if isinstance(flag, jax.Array):
        wanted = "True or False as Python has them, so a static argument of jax.jit"
    raise TypeError(must_be(name, wanted, flag))


def check_count(name: str, count: Any) -> int:
    """The count as an int; raises if it is not an int of at least 1."""
    is_int = isinstance(count, int | np.integer) and not isinstance(count, bool)
    if not is_int or count < 1:
        error = ValueError if is_int else TypeError
        raise error(must_be(name, "an int of at least 1", count))
    return int(count)


def as_ints(name: str, value: Any) -> jax.Array | np.ndarray:
    """Ints as an array, which stays in NumPy if it lies there: JAX would cut it to 32 bits."""
    leaves = jax.tree.leaves(value)  # a list of ints too
    on_host = all(isinstance(leaf, int | np.ndarray | np.generic) for leaf in leaves)
    if not on_host and not all(hasattr(leaf, "dtype") for leaf in leaves):
        raise TypeError(must_be(name, "ints", value))
    array = np.asarray(value) if on_host else jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must be ints, got {array.dtype}.")
    return array
