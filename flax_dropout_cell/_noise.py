"""A noise: what is drawn for a value, and what the draw does to it."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from ._keep_mask import Number, draw_keep_mask


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


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keep_prob"],
    meta_fields=["variational", "broadcast_dims"],
)
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Keeps a unit with probability `keep_prob`, scaled by `1 / keep_prob`, or else zeroes it.

    A boolean mask is drawn, True for a kept unit: with `variational` once per sequence (Gal and
    Ghahramani 2016, arXiv:1512.05287, eq. 7), otherwise at every step (Zaremba et al. 2014,
    arXiv:1409.2329, eq. 5). In evaluation the value comes back as it is. What a dropped unit
    held, NaN and inf included, goes neither forward nor backward.

    Args:
      keep_prob: in [0, 1], a number or a scalar array, which may be traced. 1 is the identity
        and draws nothing; 0 gives zeros. An array's value is not checked: above 1 it counts as
        1, below 0 as 0.
      variational: one mask for all steps of a sequence instead of a fresh one at each.
      broadcast_dims: the value's dims over which one mask is shared, as in
        `flax.linen.Dropout`: `(0,)` gives the whole batch one mask.

    Raises:
      ValueError: `keep_prob` is a number outside [0, 1], or NaN.
      TypeError: an argument has the wrong type.

    Example:
      >>> import jax
      >>> import flax_dropout_cell as fdc
      >>> noise = fdc.Dropout(keep_prob=0.8, broadcast_dims=(0,))
      >>> noise.draw_mask(jax.random.key(0), (32, 64), "float32").shape
      (1, 64)
    """

    keep_prob: float | jax.Array
    _: dataclasses.KW_ONLY
    variational: bool = False
    broadcast_dims: Sequence[int] = ()

    def __post_init__(self) -> None:
        check_probability("keep_prob", self.keep_prob)
        if not isinstance(self.variational, bool):
            raise TypeError(f"variational must be True or False, got {self.variational!r}.")
        if not isinstance(self.broadcast_dims, Sequence) or not all(
            isinstance(dim, int) for dim in self.broadcast_dims
        ):
            raise TypeError(
                f"broadcast_dims must be a sequence of ints such as (0,), "
                f"got {self.broadcast_dims!r}."
            )
        object.__setattr__(self, "broadcast_dims", tuple(self.broadcast_dims))

    @property
    def is_identity(self) -> bool:
        """True where `keep_prob` is the number 1: nothing is drawn and nothing is computed."""
        return isinstance(self.keep_prob, Number) and self.keep_prob == 1

    def draw_mask(self, rng: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Draws which units are kept.

        Args:
          rng: a typed or raw key.
          shape: the value's shape.
          dtype: the value's dtype; a keep-mask is boolean whatever it is.

        Returns:
          A boolean array of shape `shape`, with 1 in each of `broadcast_dims`.
        """
        del dtype
        check_scalar("keep_prob", self.keep_prob)
        return draw_keep_mask(rng, self.keep_prob, _shared_shape(shape, self.broadcast_dims))

    def apply(
        self, mask: jax.Array, value: jax.Array, previous: jax.Array | None = None
    ) -> jax.Array:
        """`value / keep_prob` where the mask is True, exactly 0 elsewhere.

        Args:
          mask: a boolean array that broadcasts to `value`.
          value: a floating-point or complex array.
          previous: not used.

        Returns:
          An array of the value's shape and dtype.
        """
        del previous
        check_scalar("keep_prob", self.keep_prob)
        mask = jnp.broadcast_to(mask, value.shape).astype(bool)
        if isinstance(self.keep_prob, Number) and self.keep_prob == 0:
            return jnp.zeros_like(value)
        # Select first, scale second: a NaN in a dropped unit then reaches neither the gradient
        # of the value nor that of keep_prob.
        kept = jnp.where(mask, value, jnp.zeros((), value.dtype))
        if isinstance(self.keep_prob, Number) and self.keep_prob == 1:
            return kept
        # Half-precision values are divided in float32: 0.8 in bfloat16 is off by 0.1 %, which
        # would bias every kept unit by as much.
        wide = value.dtype if jnp.finfo(value.dtype).bits >= 32 else jnp.dtype(jnp.float32)
        keep_prob = jnp.asarray(self.keep_prob).astype(wide)
        if not isinstance(self.keep_prob, Number):
            # At 0 there is nothing to divide, and above 1 nothing is dropped.
            unscaled = (keep_prob == 0) | (keep_prob > 1)
            keep_prob = jnp.where(unscaled, jnp.ones((), wide), keep_prob)
        return (kept.astype(wide) / keep_prob).astype(value.dtype)

    def expected(self, value: jax.Array, previous: jax.Array | None = None) -> jax.Array:
        """The value as it is."""
        del previous
        return value


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


def _shared_shape(shape: tuple[int, ...], broadcast_dims: Sequence[int]) -> tuple[int, ...]:
    shared = list(shape)
    for dim in broadcast_dims:
        if not -len(shape) <= dim < len(shape):
            raise ValueError(f"broadcast_dims has {dim}, but the value has shape {shape}.")
        shared[dim] = 1
    return tuple(shared)
