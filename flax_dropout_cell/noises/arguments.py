"""How the numbers of a noise are given: by name, and finite."""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from .._random.keep_masks import Number
from .._shown import shown
from .protocol import is_array

NoiseClass = TypeVar("NoiseClass", bound=type)


def by_name(example: str) -> Callable[[NoiseClass], NoiseClass]:
    """Makes a noise without argument names an error that shows how it is written."""

    def decorate(cls: NoiseClass) -> NoiseClass:
        init = cls.__init__

        @functools.wraps(init)
        def __init__(self: Any, *positional: Any, **named: Any) -> None:
            if positional:
                raise TypeError(
                    f"{cls.__name__} takes its numbers by name: write {example}, "
                    f"got {shown(positional[0])}."
                )
            init(self, **named)

        cls.__init__ = __init__
        return cls

    return decorate


def check_number(name: str, value: Any, *, least: float = -math.inf, above: bool = False) -> None:
    """Refuses what is no finite number from `least` on, or `above` it. Arrays are not looked at."""
    if is_array(value):
        return
    if isinstance(value, bool | np.bool_) or not isinstance(value, Number):
        raise TypeError(f"{name} must be a number or a scalar array, got {shown(value)}.")
    if not math.isfinite(value) or value < least or (above and value == least):
        bound = "" if least == -math.inf else f", {'above' if above else 'at least'} {least:g}"
        raise ValueError(f"{name} must be a finite number{bound}, got {value}.")


def wide_dtype(dtype: Any) -> Any:
    """Where a value's arithmetic happens: half precision in float32, all else as it is."""
    dtype = jnp.dtype(dtype)
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def as_wide(value: float | jax.Array, dtype: Any) -> jax.Array:
    """A noise's number as an array of a dtype."""
    return jnp.asarray(value).astype(dtype)
