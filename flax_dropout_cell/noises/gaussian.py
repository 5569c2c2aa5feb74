"""Added Gaussian noise."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from .._arguments import Number
from .._dtypes import wide_dtype
from .._sharding import broadcast_like
from .arguments import cast_and_expand, check_fits, check_number
from .base import NamedNoise, explain_missing_names
from .protocol import register_noise


@explain_missing_names
@register_noise
@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianNoise(NamedNoise):
    """Adds a normal deviate of mean 0 and standard deviation `stddev`.

    The mask is the standard normal deviate. At `params` with `variational=True` it is weight noise,
    one draw for all rows and steps of a call (Graves 2011, *Practical Variational Inference for
    Neural Networks*; Graves 2013, arXiv:1308.0850, section 3.1, with stddev 0.075). In evaluation
    the value comes back as it is.

    Args:
      stddev: in the units of the value, at least 0, a number or an array, which may be traced
        or learned and may have one for each unit, `[features]`. The number 0 is the identity and
        draws nothing; an array of zeros draws.
      variational: one draw for all steps of a sequence instead of a fresh one at each.
      broadcast_dims: the value's dims over which one draw is shared.

    Raises:
      ValueError: if `stddev` is a number below 0, or not finite.
      TypeError: if an argument has the wrong type, or `stddev` came without its name.

    Example:
      >>> import jax
      >>> import flax_dropout_cell as fdc
      >>> weight_noise = fdc.GaussianNoise(stddev=0.075, variational=True)
      >>> weight_noise.draw_mask(jax.random.key(0), (32, 64), "float32").shape
      (32, 64)
    """

    stddev: float | jax.Array
    variational: bool = False
    broadcast_dims: Sequence[int] = ()

    how_to_write: ClassVar[str] = "write GaussianNoise(stddev=0.1)"
    mask_kind: ClassVar[Any] = jnp.inexact

    reparameterized = True

    def __post_init__(self) -> None:
        check_number("stddev", self.stddev, least=0)
        super().__post_init__()

    @property
    def is_identity(self) -> bool:
        """Whether `stddev` is the number 0, so that nothing is drawn or computed."""
        return isinstance(self.stddev, Number) and bool(self.stddev == 0)

    def draw_mask(self, rng: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Draws standard normal deviates.

        Args:
          rng: a typed or raw key.
          shape: the value's shape.
          dtype: the value's dtype. Half-precision deviates are rounded from float32; complex ones
            have a variance of 1/2 in each part.

        Returns:
          An array of this dtype and of shape `shape`, with 1 in each of `broadcast_dims`.
        """
        shape = self.mask_shape(shape)
        return jax.random.normal(rng, shape, wide_dtype(dtype)).astype(dtype)

    def apply(
        self, mask: jax.Array, value: jax.Array, previous: jax.Array | None = None
    ) -> jax.Array:
        """`value + stddev * mask`.

        Args:
          mask: standard normal deviates that broadcast to `value`.
          value: a floating-point or complex array.
          previous: not used.

        Returns:
          An array of the value's shape and dtype.
        """
        del previous
        check_fits("stddev", self.stddev, value.shape)
        # In float32, so that the sum is rounded once.
        wide = wide_dtype(value.dtype)
        deviates = broadcast_like(mask, value).astype(wide)
        stddev = cast_and_expand(self.stddev, value, wide)
        return (value.astype(wide) + stddev * deviates).astype(value.dtype)

    def expected(self, value: jax.Array, previous: jax.Array | None = None) -> jax.Array:
        """The value as it is."""
        del previous
        return value
