"""Inverted dropout."""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._random.keep_masks import Number, draw_keep_mask
from .._shown import shown
from .protocol import check_probability, check_scalar, check_shared, register_noise, shared_shape


@register_noise
@dataclasses.dataclass(frozen=True, kw_only=True)
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
      scale: False leaves a kept unit as it is, and multiplies by `keep_prob` in evaluation
        instead (Srivastava et al. 2014, section 4).

    Raises:
      ValueError: `keep_prob` is a number outside [0, 1], or NaN.
      TypeError: an argument has the wrong type, or `keep_prob` came without its name.

    Example:
      >>> import jax
      >>> import flax_dropout_cell as fdc
      >>> noise = fdc.Dropout(keep_prob=0.8, broadcast_dims=(0,))
      >>> noise.draw_mask(jax.random.key(0), (32, 64), "float32").shape
      (1, 64)
    """

    keep_prob: float | jax.Array
    variational: bool = False
    broadcast_dims: Sequence[int] = ()
    scale: bool = True

    def __new__(cls, *positional: Any, **named: Any) -> "Dropout":
        if positional or (named and "keep_prob" not in named):  # copies are made without any
            raise TypeError(
                "Dropout takes the probability of keeping a unit, by name: "
                "nn.Dropout(0.2) is Dropout(keep_prob=0.8)."
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_probability("keep_prob", self.keep_prob)
        check_shared(self.variational, self.broadcast_dims)
        if not isinstance(self.scale, bool):
            raise TypeError(f"scale must be True or False, got {shown(self.scale)}.")
        object.__setattr__(self, "broadcast_dims", tuple(self.broadcast_dims))

    @property
    def is_identity(self) -> bool:
        """True where `keep_prob` is the number 1: nothing is drawn and nothing is computed."""
        return isinstance(self.keep_prob, Number) and bool(self.keep_prob == 1)

    @property
    def scales(self) -> bool:
        """True where a kept unit grows."""
        return self.scale

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
        return draw_keep_mask(rng, self.keep_prob, shared_shape(shape, self.broadcast_dims))

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
        # Half-precision values are divided in float32: 0.8 in bfloat16 is off by 0.1 %, which
        # would bias every kept unit by as much.
        wide = value.dtype if jnp.finfo(value.dtype).bits >= 32 else jnp.dtype(jnp.float32)
        if isinstance(self.keep_prob, Number) and self.keep_prob < jnp.finfo(wide).tiny:
            return jnp.zeros_like(value)
        # Select first, scale second: a NaN in a dropped unit then reaches neither the gradient
        # of the value nor that of keep_prob.
        kept = jnp.where(mask, value, jnp.zeros((), value.dtype))
        if self.is_identity or not self.scale:
            return kept
        keep_prob = jnp.asarray(self.keep_prob).astype(wide)
        if not isinstance(self.keep_prob, Number):
            # At 0 there is nothing to divide, and above 1 nothing is dropped.
            unscaled = (keep_prob == 0) | (keep_prob > 1)
            keep_prob = jnp.where(unscaled, jnp.ones((), wide), keep_prob)
        return (kept.astype(wide) / keep_prob).astype(value.dtype)

    def expected(self, value: jax.Array, previous: jax.Array | None = None) -> jax.Array:
        """The value as it is; with `scale=False`, times `keep_prob`."""
        del previous
        if self.scale or self.is_identity:
            return value
        check_scalar("keep_prob", self.keep_prob)
        wide = value.dtype if jnp.finfo(value.dtype).bits >= 32 else jnp.dtype(jnp.float32)
        return (value.astype(wide) * jnp.asarray(self.keep_prob).astype(wide)).astype(value.dtype)


# `__new__` is there for its error alone.
_named = inspect.signature(Dropout.__init__)
Dropout.__signature__ = _named.replace(  # type: ignore[attr-defined]
    parameters=[parameter for name, parameter in _named.parameters.items() if name != "self"]
)
