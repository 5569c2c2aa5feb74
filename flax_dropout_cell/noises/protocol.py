"""What every noise can do, and what is checked of its numbers."""

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from .._random.keep_masks import Number


@runtime_checkable
class Noise(Protocol):
    """What every noise can do. Write these four members and your noise works at every site.

    Make it a frozen dataclass, registered with `jax.tree_util.register_dataclass` with its
    probabilities as data fields, and it can be traced, mapped and differentiated as well. A
    noise that has an attribute `is_identity` which is True is skipped: nothing is drawn for it.

    Example:
      >>> import dataclasses, functools, jax
      >>> import flax_dropout_cell as fdc
      >>> @functools.partial(
      ...     jax.tree_util.register_dataclass, data_fields=["stddev"], meta_fields=["variational"]
      ... )
      ... @dataclasses.dataclass(frozen=True)
      ... class AddedNoise:
      ...     stddev: float
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
      >>> isinstance(AddedNoise(0.1), fdc.Noise)
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
        """The noisy value, in training. `previous` is the incoming carry's leaf at `state`."""
        ...

    def expected(self, value: jax.Array, previous: jax.Array | None) -> jax.Array:
        """The value in evaluation."""
        ...


def is_identity(noise: Noise) -> bool:
    """Whether a noise changes nothing and is to be skipped."""
    return getattr(noise, "is_identity", False)


def check_probability(name: str, probability: Any) -> None:
    """Refuses a number outside [0, 1]. Arrays pass: their values are on the device."""
    if isinstance(probability, bool | np.bool_):
        raise TypeError(f"{name} must be a number in [0, 1], got {probability!r}.")
    if isinstance(probability, Number) and (math.isnan(probability) or not 0 <= probability <= 1):
        raise ValueError(f"{name} must be between 0 and 1, got {probability}.")


def check_scalar(name: str, probability: Any) -> None:
    """Refuses, at its first use, what is neither a number nor a scalar array.

    Construction cannot: JAX builds pytrees of anything, such as axis specs and labels.
    """
    if isinstance(probability, Number):
        return
    if not isinstance(probability, jax.Array | np.ndarray):
        raise TypeError(
            f"{name} must be a number in [0, 1] or a scalar array, got {probability!r}."
        )
    if probability.shape != ():
        raise ValueError(
            f"{name} must be a scalar where it is used, got shape {probability.shape}; "
            f"map over several values with jax.vmap."
        )
    if not jnp.issubdtype(probability.dtype, jnp.floating):
        raise TypeError(f"{name} must be a floating-point array, got {probability.dtype}.")


def shared_shape(shape: tuple[int, ...], broadcast_dims: Sequence[int]) -> tuple[int, ...]:
    shared = list(shape)
    for dim in broadcast_dims:
        if not -len(shape) <= dim < len(shape):
            raise ValueError(f"broadcast_dims has {dim}, but the value has shape {shape}.")
        shared[dim] = 1
    return tuple(shared)
