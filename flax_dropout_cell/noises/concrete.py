"""Concrete dropout: dropout whose probability is learned."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from .._dtypes import wide_dtype
from .arguments import cast_and_expand, check_fits, check_number
from .base import NamedNoise, explain_missing_names
from .protocol import register_noise


@explain_missing_names
@register_noise
@dataclasses.dataclass(frozen=True, kw_only=True)
class ConcreteDropout(NamedNoise):
    """Dropout whose probability of dropping a unit, `p = sigmoid(logit)`, gradients can learn.

    Gal, Hron and Kendall 2017, arXiv:1705.07832, equation 5: the mask is a uniform deviate u, and
    a unit is multiplied by `(1 - z) / (1 - p)`, where
    `z = sigmoid((logit + log u - log(1 - u)) / temperature)` is close to 0 or 1. Add
    `concrete_regularization` to the loss: the likelihood alone pulls p to 0. In evaluation the
    value comes back as it is.

    Args:
      logit: log(p / (1 - p)), an array to learn it, of one for all units or one for each,
        `[features]`; or a number.
      temperature: above 0; the lower, the closer to dropout and the steeper the gradients. The
        paper's is 0.1.
      variational: one draw for all steps of a sequence instead of a fresh one at each.
      broadcast_dims: the value's dims over which one draw is shared.

    Raises:
      ValueError: if `logit` is a number that is not finite, or `temperature` a number that is not
        above 0.
      TypeError: if an argument has the wrong type, or came without its name.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> def loss(logit):
      ...     noise = fdc.ConcreteDropout(logit=logit)
      ...     mask = noise.draw_mask(jax.random.key(0), (4, 8), "float32")
      ...     return (noise.apply(mask, jnp.ones((4, 8))) ** 2).mean()
      >>> jax.grad(loss)(jnp.float32(-2.0)).shape
      ()
    """

    logit: float | jax.Array
    temperature: float | jax.Array = 0.1
    variational: bool = False
    broadcast_dims: Sequence[int] = ()

    how_to_write: ClassVar[str] = "write ConcreteDropout(logit=params['logit'])"
    mask_kind: ClassVar[Any] = jnp.floating

    amplifies = True
    reparameterized = True

    def __post_init__(self) -> None:
        check_number("logit", self.logit)
        check_number("temperature", self.temperature, least=0, above=True)
        super().__post_init__()

    def draw_mask(self, rng: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Draws uniform deviates.

        Args:
          rng: a typed or raw key.
          shape: the value's shape.
          dtype: the value's dtype. For half precision the deviates are float32 all the same:
            rounded, many of them would be 1.

        Returns:
          A real array of numbers between 0 and 1, of shape `shape` with 1 in each of
          `broadcast_dims`.
        """
        real = jnp.finfo(wide_dtype(dtype)).dtype
        shape = self.mask_shape(shape)
        # Above 0, so that its logarithm is finite.
        return jax.random.uniform(rng, shape, real, minval=jnp.finfo(real).tiny)

    def apply(
        self, mask: jax.Array, value: jax.Array, previous: jax.Array | None = None
    ) -> jax.Array:
        """`value * (1 - z) / (1 - p)`; a unit whose factor rounds to 0 is exactly 0.

        Args:
          mask: uniform deviates that broadcast to `value`.
          value: a floating-point or complex array.
          previous: not used.

        Returns:
          An array of the value's shape and dtype.
        """
        del previous
        check_fits("logit", self.logit, value.shape)
        check_fits("temperature", self.temperature, value.shape)
        wide = wide_dtype(value.dtype)
        real = jnp.finfo(wide).dtype
        logit, uniform = cast_and_expand(self.logit, value, real), mask.astype(real)
        relaxed = logit + jnp.log(uniform) - jnp.log1p(-uniform)
        # As a difference of logarithms, because 1 - p may round to 0.
        log_kept = jax.nn.log_sigmoid(-relaxed / cast_and_expand(self.temperature, value, real))
        factor = jnp.exp(log_kept - jax.nn.log_sigmoid(-logit))
        factor = jnp.broadcast_to(factor, value.shape)
        # Select first: what a dropped unit holds, NaN included, goes neither forward nor backward.
        kept = jnp.where(factor > 0, value, jnp.zeros((), value.dtype))
        return (kept.astype(wide) * factor.astype(wide)).astype(value.dtype)

    def expected(self, value: jax.Array, previous: jax.Array | None = None) -> jax.Array:
        """The value as it is."""
        del previous
        return value
