"""What every noise can do, and what is checked of its numbers."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey

from .._random.keep_masks import Number
from .._shown import shown


@runtime_checkable
class Noise(Protocol):
    """The protocol of a noise: an object with these four members works at every site.

    Make it a frozen dataclass with `register_noise` on top: then its numbers are static and its
    arrays can be traced, mapped and differentiated. Three more attributes are optional, each a
    bool: `is_identity` (True: the noise is skipped and draws nothing), `needs_previous` (True: it
    is refused at sites that have no previous value), and `scales` (True: a kept unit grows, so
    the noise is refused where that would grow at every step).

    Example:
      >>> import dataclasses, jax
      >>> import flax_dropout_cell as fdc
      >>> @fdc.register_noise
      ... @dataclasses.dataclass(frozen=True, kw_only=True)
      ... class AddedNoise:
      ...     stddev: float | jax.Array
      ...     variational: bool = False
      ...
      ...     def draw_mask(self, rng, shape, dtype):
      ...         return jax.random.normal(rng, shape, dtype)
      ...
      ...     def apply(self, mask, value, previous):
      ...         return value + self.stddev * mask
      ...
      ...     def expected(self, value, previous):
      ...         return value
      >>> isinstance(AddedNoise(stddev=0.1), fdc.Noise)
      True
    """

    @property
    def variational(self) -> bool:
        """True: one mask for all steps of a sequence. False: a fresh mask at each step."""
        ...

    def draw_mask(self, rng: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Draws what `apply` needs for a value of this shape and dtype, broadcastable to it."""
        ...

    def apply(self, mask: jax.Array, value: jax.Array, previous: jax.Array | None) -> jax.Array:
        """The noisy value, in training. `previous` is what the site held at the step before."""
        ...

    def expected(self, value: jax.Array, previous: jax.Array | None) -> jax.Array:
        """The value in evaluation."""
        ...


NoiseClass = TypeVar("NoiseClass", bound=type)


def register_noise(cls: NoiseClass) -> NoiseClass:
    """Registers a frozen dataclass as a pytree: its arrays are leaves, the rest is static.

    A number that is given for a probability is part of the noise's structure: the noise is
    hashable, passes through `jax.jit` unchanged, and retraces when the number changes. An array is
    data: it can be traced, mapped and differentiated, and does not retrace.

    Args:
      cls: a frozen dataclass.

    Returns:
      The class itself.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> jax.tree.leaves(fdc.Dropout(keep_prob=0.8))
      []
      >>> jax.tree.leaves(fdc.Dropout(keep_prob=jnp.float32(0.8)))
      [Array(0.8, dtype=float32)]
    """
    names = tuple(field.name for field in dataclasses.fields(cls))

    def split(noise: Any) -> tuple[tuple[str, ...], Any]:
        # A rebuilt noise keeps its leaves where they were: tree functions put anything there,
        # axis numbers and sizes among it.
        data = vars(noise).get("_data")
        if data is None:
            data = tuple(name for name in names if is_array(getattr(noise, name)))
        return data, tuple((name, getattr(noise, name)) for name in names if name not in data)

    def flatten(noise: Any) -> tuple[list[Any], Any]:
        data, static = split(noise)
        return [getattr(noise, name) for name in data], (data, static)

    def flatten_with_keys(noise: Any) -> tuple[list[Any], Any]:
        data, static = split(noise)
        return [(GetAttrKey(name), getattr(noise, name)) for name in data], (data, static)

    def unflatten(structure: Any, leaves: Any) -> Any:
        data, static = structure
        noise = object.__new__(cls)
        vars(noise).update(static, _data=data)
        vars(noise).update(zip(data, leaves, strict=True))
        return noise

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def is_array(value: Any) -> bool:
    """Whether a value is data, on the device or traced, rather than a number."""
    return hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, np.generic)


def is_identity(noise: Noise) -> bool:
    """Whether a noise changes nothing and is to be skipped."""
    return _flag(noise, "is_identity")


def needs_previous(noise: Noise) -> bool:
    """Whether a noise mixes in what the site held at the step before."""
    return _flag(noise, "needs_previous")


def scales(noise: Noise) -> bool:
    """Whether a noise makes the units that it keeps larger."""
    return _flag(noise, "scales") and not is_identity(noise)


def _flag(noise: Noise, name: str) -> bool:
    value = getattr(noise, name, False)
    if not isinstance(value, bool | np.bool_):
        raise TypeError(
            f"{type(noise).__name__}.{name} must be True or False, got a "
            f"{type(value).__name__}; make it a field or a property."
        )
    return bool(value)


def check_noise(where: str, noise: Any) -> None:
    """Refuses what is no noise, or one that would be misread."""
    if isinstance(noise, type):
        raise TypeError(
            f"{where} holds the class {noise.__name__}; give an instance of it, such as "
            f"Dropout(keep_prob=0.8)."
        )
    if not isinstance(noise, Noise):
        raise TypeError(
            f"{where} must hold noises such as Dropout(keep_prob=0.8) or None, "
            f"got {_describe(noise)}."
        )
    _flag(noise, "variational")
    for name in ("is_identity", "needs_previous", "scales"):
        _flag(noise, name)


def _describe(value: Any) -> str:
    members = ("variational", "draw_mask", "apply", "expected")
    missing = [name for name in members if not hasattr(value, name)]
    if len(missing) < len(members):
        return f"a {type(value).__name__}, which lacks {', '.join(missing)} to be one"
    return shown(value)


def check_probability(name: str, probability: Any) -> None:
    """Refuses what is no number in [0, 1] and no array, whose values are on the device."""
    if is_array(probability):
        return
    if isinstance(probability, bool | np.bool_) or not isinstance(probability, Number):
        raise TypeError(
            f"{name} must be a number in [0, 1] or a scalar array, got {shown(probability)}."
        )
    if math.isnan(probability) or not 0 <= probability <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {probability}.")


def check_shared(variational: Any, broadcast_dims: Any) -> None:
    """Refuses what every noise's `variational` and `broadcast_dims` cannot be."""
    if not isinstance(variational, bool):
        raise TypeError(f"variational must be True or False, got {shown(variational)}.")
    if not isinstance(broadcast_dims, Sequence) or not all(
        isinstance(dim, int) for dim in broadcast_dims
    ):
        raise TypeError(
            f"broadcast_dims must be a sequence of ints such as (0,), got {shown(broadcast_dims)}."
        )


def check_scalar(name: str, value: Any) -> None:
    """Refuses, where it is used, what is neither a number nor a floating-point scalar array."""
    if isinstance(value, Number):
        return
    if not is_array(value):
        raise TypeError(f"{name} must be a number in [0, 1] or a scalar array, got {shown(value)}.")
    if value.shape != ():
        raise ValueError(
            f"{name} must be a scalar where it is used, got shape {value.shape}; "
            f"map over several values with jax.vmap."
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{name} must be a floating-point array, got {value.dtype}.")


def shared_shape(shape: tuple[int, ...], broadcast_dims: Sequence[int]) -> tuple[int, ...]:
    """The shape of a mask that is shared over `broadcast_dims`."""
    shared = list(shape)
    for dim in broadcast_dims:
        if not -len(shape) <= dim < len(shape):
            raise ValueError(f"broadcast_dims has {dim}, but the value has shape {shape}.")
        shared[dim] = 1
    return tuple(shared)
