"""The protocol of a noise, its registration as a pytree, and its optional attributes."""

import dataclasses
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from jax.tree_util import GetAttrKey

from .._messages import must_be, short_repr, with_article


@runtime_checkable
class Noise(Protocol):
    """The protocol of a noise: an object with these four members is a noise.

    Make it a frozen dataclass with `register_noise` on top: its numbers are then static, and its
    arrays can be traced, mapped and differentiated. More attributes are optional:

    - `is_identity`, a bool: if True, the noise is skipped and draws nothing.
    - `needs_previous`, a bool: if True, the noise is an error at sites without a previous value.
    - `amplifies`, a bool: if True, kept units grow, and the noise is an error at sites where they
      would grow at every step.
    - `reparameterized`, a bool: if True, the mask does not depend on the noise's numbers. A
      wrapper's carry then does not keep them, and a learned number has a gradient in every window.
    - `broadcast_dims`, a tuple of ints: the dims that share a mask. A mask that is shared over the
      batch is drawn once for all rows, whatever their ids.
    - `mask_kind`, a kind of dtype such as `jnp.bool_`: masks of another kind that a caller gives
      are an error. A subclass of `Dropout` whose masks are not booleans sets its own.

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
        """Whether all steps of a sequence have one mask; if not, each draws its own."""
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

_MEMBERS = ("variational", "draw_mask", "apply", "expected")
_HAS_MEMBERS = f"a noise has {', '.join(_MEMBERS[:-1])} and {_MEMBERS[-1]}"


def register_noise(cls: NoiseClass) -> NoiseClass:
    """Registers a frozen dataclass as a pytree: its arrays are leaves, the rest is static.

    A number that is given for a probability is part of the noise's structure: the noise is
    hashable, passes through `jax.jit` unchanged, and retraces when the number changes. An array is
    data: it can be traced, mapped and differentiated, and does not retrace.

    Args:
      cls: a frozen dataclass.

    Returns:
      The class itself.

    Raises:
      TypeError: if `cls` is not a frozen dataclass, or lacks a member of a noise.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> jax.tree.leaves(fdc.Dropout(keep_prob=0.8))
      []
      >>> jax.tree.leaves(fdc.Dropout(keep_prob=jnp.float32(0.8)))
      [Array(0.8, dtype=float32)]
    """
    params = getattr(cls, "__dataclass_params__", None)
    if params is None or not params.frozen:
        raise TypeError(
            f"register_noise takes a frozen dataclass: write @dataclasses.dataclass(frozen=True) "
            f"between it and {cls.__name__}."
        )
    names = tuple(field.name for field in dataclasses.fields(cls))
    # As a pytree without leaves, an object that is not a noise would be taken for no noise at all.
    missing = [name for name in _MEMBERS if name not in names and not hasattr(cls, name)]
    if missing:
        raise TypeError(f"{cls.__name__} lacks {', '.join(missing)}: {_HAS_MEMBERS}.")

    def split(noise: Any) -> tuple[tuple[str, ...], Any]:
        # A rebuilt noise has the same leaves as before, whatever they hold now: tree functions also
        # put axis numbers or sizes there.
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
        vars(noise).update(static)
        vars(noise).update(zip(data, leaves, strict=True))
        vars(noise)["_data"] = data
        return noise

    # Not register_dataclass, whose fields are data or static for all instances of a class: here it
    # depends on the value.
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


def amplifies(noise: Noise) -> bool:
    """Whether a noise makes the units that it keeps larger."""
    return _flag(noise, "amplifies") and not is_identity(noise)


def is_reparameterized(noise: Noise) -> bool:
    """Whether the masks of a noise do not depend on its numbers."""
    return _flag(noise, "reparameterized")


def mask_kind(noise: Noise) -> Any:
    """The kind of dtype that a noise's masks have; None if it does not say."""
    return getattr(noise, "mask_kind", None)


def shared_dims(noise: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The dims of a value over which a noise shares one mask, counted from the first."""
    dims: tuple[int, ...] = tuple(getattr(noise, "broadcast_dims", ()))
    for dim in dims:
        if not -len(shape) <= dim < len(shape):
            raise ValueError(f"broadcast_dims has {dim}, but the value has shape {shape}.")
    return tuple(dim % len(shape) for dim in dims)


def _flag(noise: Noise, name: str) -> bool:
    value = getattr(noise, name, False)
    # A method is true whatever it returns, so the noise would silently be skipped, or refused.
    if not isinstance(value, bool | np.bool_):
        raise TypeError(must_be(f"{type(noise).__name__}.{name}", "True or False", value))
    return bool(value)


def check_noise(where: str, noise: Any) -> None:
    """Raises if an object is not a noise, or is one that would be misread."""
    if isinstance(noise, type):
        raise TypeError(f"{where} holds the class {noise.__name__}; give an instance of it.")
    if not isinstance(noise, Noise):
        wanted = "noises such as Dropout(keep_prob=0.8) or None"
        raise TypeError(f"{where} must hold {wanted}, got {_describe(noise)}.")
    _flag(noise, "variational")
    for name in ("is_identity", "needs_previous", "amplifies", "reparameterized"):
        _flag(noise, name)


def _describe(value: Any) -> str:
    missing = [name for name in _MEMBERS if not hasattr(value, name)]
    if len(missing) < len(_MEMBERS):
        module = type(value).__module__.split(".")[0]  # `Dropout` is a name in Flax too
        name = f"{with_article(type(value).__name__)} of {module}"
        lacking = f"{name}, which lacks {', '.join(missing)}"
        return f"{lacking}: {_HAS_MEMBERS}"
    return short_repr(value)
