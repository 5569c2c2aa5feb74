"""Inverted dropout."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from .._arguments import Number
from .._dtypes import wide_dtype
from .._messages import must_be
from .._random.keep_masks import draw_keep_mask
from .._sharding import broadcast_like
from .arguments import cast_and_expand, check_fits, check_probability, clip_probability
from .base import NamedNoise, explain_missing_names
from .protocol import register_noise


@explain_missing_names
@register_noise
@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropout(NamedNoise):
    """Keeps a unit with probability `keep_prob`, scaled by `1 / keep_prob`, or else zeroes it.

    A boolean mask is drawn, True for a kept unit: with `variational` once per sequence (Gal and
    Ghahramani 2016, arXiv:1512.05287, eq. 7), otherwise at every step (Zaremba et al. 2014,
    arXiv:1409.2329, eq. 5). In evaluation the value comes back as it is. The value of a dropped
    unit, even NaN or inf, affects neither the output nor the gradient.

    Args:
      keep_prob: in [0, 1], a number or an array, which may be traced and may have one for each
        unit, `[features]`. The number 1 is the identity and draws nothing; an array of ones draws.
        0 gives zeros. An array's values are not checked: above 1 they count as 1, below 0 as 0.
      variational: one mask for all steps of a sequence instead of a fresh one at each.
      broadcast_dims: the value's dims over which one mask is shared, as in
        `flax.linen.Dropout`: `(0,)` gives the whole batch one mask.
      scale: False leaves a kept unit as it is, and multiplies by `keep_prob` in evaluation
        instead (Srivastava et al. 2014, section 4).

    Raises:
      ValueError: if `keep_prob` is a number outside [0, 1], or NaN.
      TypeError: if an argument has the wrong type, or `keep_prob` came without its name.

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

    how_to_write: ClassVar[str] = "nn.Dropout(0.2) is Dropout(keep_prob=0.8)"
    mask_kind: ClassVar[Any] = jnp.bool_
    keep_mask_field: ClassVar[str | None] = "keep_prob"

    def __post_init__(self) -> None:
        check_probability("keep_prob", self.keep_prob)
        super().__post_init__()
        if not isinstance(self.scale, bool):
            raise TypeError(must_be("scale", "True or False", self.scale))

    @property
    def is_identity(self) -> bool:
        """Whether `keep_prob` is the number 1, so that nothing is drawn or computed."""
        return isinstance(self.keep_prob, Number) and bool(self.keep_prob == 1)

    @property
    def amplifies(self) -> bool:
        """Whether kept units become larger."""
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
        check_fits("keep_prob", self.keep_prob, self.mask_shape(shape))
        return draw_keep_mask(rng, self.keep_prob, self.mask_shape(shape))

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
        check_fits("keep_prob", self.keep_prob, value.shape)
        mask = broadcast_like(mask, value).astype(bool)
        # Half-precision values are divided in float32: 0.8 in bfloat16 is off by 0.1 %, which
        # would bias every kept unit by as much.
        wide = wide_dtype(value.dtype)
        if isinstance(self.keep_prob, Number) and self.keep_prob < jnp.finfo(wide).tiny:
            return jnp.zeros_like(value)
        # Select first, scale second: a NaN in a dropped unit then reaches neither the gradient
        # of the value nor that of keep_prob.
        kept = jnp.where(mask, value, jnp.zeros((), value.dtype))
        if self.is_identity or not self.scale:
            return kept
        keep_prob = cast_and_expand(self.keep_prob, value, wide)
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
        check_fits("keep_prob", self.keep_prob, value.shape)
        wide = wide_dtype(value.dtype)
        return (value.astype(wide) * clip_probability(self.keep_prob, value, wide)).astype(
            value.dtype
        )
