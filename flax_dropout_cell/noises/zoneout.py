"""Zoneout: some units stay what they were."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .._arguments import Number
from .._dtypes import wide_dtype
from .._random.keep_masks import draw_keep_mask
from .._sharding import broadcast_like
from .arguments import check_fits, check_probability, clip_probability
from .base import NamedNoise, explain_missing_names
from .protocol import register_noise


@explain_missing_names
@register_noise
@dataclasses.dataclass(frozen=True, kw_only=True)
class Zoneout(NamedNoise):
    """Lets a unit stay what it was at the step before, with probability `prob`.

    Krueger et al. 2016, arXiv:1606.01305, equations 2 to 4: at each step a boolean mask is drawn,
    True where the new value passes; nothing is scaled. In evaluation the value is the expectation,
    `prob * previous + (1 - prob) * value`. It needs a site that has a value of the step before:
    `state`, or inside a cell a site that passes `previous`, such as `hidden` and `memory` in this
    library's cells.

    Args:
      prob: the probability of the OLD value, in [0, 1], a number or an array, which may be traced
        and may have one for each unit, `[features]`. The number 0 is the identity and draws
        nothing; an array of zeros draws. An array's values are not checked: above 1 they count as
        1, below 0 as 0.
      variational: one mask for all steps. A unit that is held back then stays at its initial
        state for the whole sequence, which is rarely useful.
      broadcast_dims: the value's dims over which one mask is shared.

    Raises:
      ValueError: if `prob` is a number outside [0, 1], or NaN.
      TypeError: if an argument has the wrong type, or `prob` came without its name.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> noise = fdc.Zoneout(prob=0.5)
      >>> mask = noise.draw_mask(jax.random.key(0), (4, 8), "float32")
      >>> noise.apply(mask, jnp.ones((4, 8)), jnp.zeros((4, 8))).shape
      (4, 8)
    """

    prob: float | jax.Array
    variational: bool = False
    broadcast_dims: Sequence[int] = ()

    how_to_write: ClassVar[str] = "write Zoneout(prob=0.1)"
    mask_kind: ClassVar[Any] = jnp.bool_
    keep_mask_field: ClassVar[str | None] = "prob"

    needs_previous = True

    def __post_init__(self) -> None:
        check_probability("prob", self.prob)
        super().__post_init__()

    @property
    def is_identity(self) -> bool:
        """Whether `prob` is the number 0, so that nothing is drawn or computed."""
        return isinstance(self.prob, Number) and bool(self.prob == 0)

    def draw_mask(self, rng: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Draws which units take the new value.

        Args:
          rng: a typed or raw key.
          shape: the value's shape.
          dtype: the value's dtype; the mask is boolean whatever it is.

        Returns:
          A boolean array of shape `shape`, with 1 in each of `broadcast_dims`.
        """
        del dtype
        check_fits("prob", self.prob, self.mask_shape(shape))
        # In float32 for numbers too, so that a number and its array give one mask.
        if isinstance(self.prob, Number):
            new = float(np.float32(1) - np.float32(self.prob))
        else:
            new = 1 - self.prob.astype(jnp.float32)
        return draw_keep_mask(rng, new, self.mask_shape(shape))

    def apply(
        self, mask: jax.Array, value: jax.Array, previous: jax.Array | None = None
    ) -> jax.Array:
        """`value` where the mask is True, `previous` elsewhere.

        Args:
          mask: a boolean array that broadcasts to `value`.
          value: the new value.
          previous: what it was at the step before.

        Returns:
          An array of the value's shape and dtype.

        Raises:
          ValueError: if there is no `previous`.
        """
        previous = _given(previous, value)
        return jnp.where(broadcast_like(mask, value).astype(bool), value, previous)

    def expected(self, value: jax.Array, previous: jax.Array | None = None) -> jax.Array:
        """`prob * previous + (1 - prob) * value`.

        Args:
          value: the new value.
          previous: what it was at the step before.

        Returns:
          An array of the value's shape and dtype.

        Raises:
          ValueError: if there is no `previous`.
        """
        if self.is_identity:
            return value
        previous = _given(previous, value)
        check_fits("prob", self.prob, value.shape)
        wide = wide_dtype(value.dtype)
        old = clip_probability(self.prob, value, wide)
        mixed = old * previous.astype(wide) + (1 - old) * value.astype(wide)
        return mixed.astype(value.dtype)


def _given(previous: jax.Array | None, value: jax.Array) -> jax.Array:
    if previous is None:
        raise ValueError("Zoneout needs the value of the step before, got None.")
    return broadcast_like(jnp.asarray(previous), value).astype(value.dtype)
