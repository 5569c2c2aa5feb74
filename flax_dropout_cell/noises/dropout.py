"""Inverted dropout."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._random.keep_masks import Number, draw_keep_mask
from .protocol import check_probability, check_scalar, shared_shape


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
