"""Checks of a noise's numbers, and their form as arrays that broadcast to a value."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._arguments import Number
from .._messages import must_be
from .protocol import is_array


def check_number(name: str, value: Any, *, least: float = -math.inf, above: bool = False) -> None:
    """Raises if a number is not finite, or below `least`. Arrays, which may be traced, are not
    checked.
    """
    if is_array(value):
        return
    if isinstance(value, bool | np.bool_) or not isinstance(value, Number):
        raise TypeError(must_be(name, "a number or an array", value))
    if not math.isfinite(value) or value < least or (above and value == least):
        bound = "" if least == -math.inf else f", {'above' if above else 'at least'} {least:g}"
        raise ValueError(f"{name} must be a finite number{bound}, got {value}.")


def check_probability(name: str, probability: Any) -> None:
    """Raises if a number is not in [0, 1]. Arrays, which may be traced, are not checked."""
    if is_array(probability):
        return
    if isinstance(probability, bool | np.bool_) or not isinstance(probability, Number):
        raise TypeError(must_be(name, "a number in [0, 1] or an array", probability))
    if not 0 <= probability <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {probability}.")


def check_fits(name: str, value: Any, shape: tuple[int, ...]) -> None:
    """Raises if a noise's number, where it is used, does not fit what it is used for.

    Args:
      name: the argument's.
      value: a number, or an array.
      shape: what an array must broadcast to, a value's shape or a mask's.
    """
    if isinstance(value, Number):
        return
    if not is_array(value):
        raise TypeError(must_be(name, "a number or an array", value))
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{name} must be a floating-point array, got {value.dtype}.")
    # jnp.broadcast_to would refuse too, but inside a cell, and it would not name the argument.
    trailing = shape[len(shape) - value.ndim :]
    if value.ndim > len(shape) or any(
        size not in (1, wanted) for size, wanted in zip(value.shape, trailing, strict=True)
    ):
        raise ValueError(
            f"{name} has shape {value.shape}, which does not broadcast to {shape}; give one "
            f"number, or one for each unit. For several values at once use jax.vmap."
        )


def cast_and_expand(number: float | jax.Array, value: jax.Array, dtype: Any) -> jax.Array:
    """A noise's number in a dtype, with as many dims as the value, of size 1 in front."""
    number = jnp.asarray(number).astype(dtype)
    # Users may have rank promotion raise, so dims are added by hand.
    missing = value.ndim - number.ndim
    return number.reshape((1,) * missing + number.shape) if number.ndim else number


def clip_probability(probability: float | jax.Array, value: jax.Array, dtype: Any) -> jax.Array:
    """A probability clipped to [0, 1], in a dtype, with as many dims as the value."""
    prob = cast_and_expand(probability, value, dtype)
    # Not jnp.clip, which halves the derivative at 0 and 1 themselves.
    outside = jnp.where(prob.real > 1, jnp.ones_like(prob), jnp.zeros_like(prob))
    return jnp.where((prob.real < 0) | (prob.real > 1), outside, prob)
