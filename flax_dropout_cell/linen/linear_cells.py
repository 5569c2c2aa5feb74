"""This library's linear cells as linen cells; their weights have the core's names."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer

from .. import cells
from .._flax.cell_weights import complex_dtype, promote
from ..cells.disturb import Disturb, undisturbed


class LinearCell(nn.RNNCellBase):
    """Shared by the linear cells: a cell of the core, with its weights as parameters."""

    _init: ClassVar[Callable[..., Any]]
    _run: ClassVar[Callable[..., Any]]

    features: int
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    carry_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(
        self, carry: jax.Array, inputs: jax.Array, *, disturb: Disturb = undisturbed
    ) -> tuple[jax.Array, jax.Array]:
        """One step.

        Args:
          carry: h, `[*batch, features]`.
          inputs: `[*batch, in_features]`.
          disturb: called at each site inside.

        Returns:
          `(h, y)`: the new h and the output, each `[*batch, features]`.
        """
        x, params = promote(inputs, self._weights(jnp.shape(inputs)[-1]), self.dtype)
        return self._run(params, carry, x, disturb=disturb)

    @nn.nowrap
    def _draw(self, rng: jax.Array, in_features: int) -> Any:
        """Draws the initial weights."""
        return self._init(rng, in_features, self.features, self.param_dtype)

    @nn.nowrap
    def shapes(self, in_features: int) -> Any:
        """The shapes of the weights, as the core has them."""
        return jax.eval_shape(lambda rng: self._draw(rng, in_features), jax.random.key(0))

    def _weights(self, in_features: int) -> Any:
        shapes = self.shapes(in_features)
        # All are drawn from one key: the gamma of an LRU depends on its nu.
        made = self.has_variable("params", shapes._fields[0])
        draws = self.is_mutable_collection("params") and not made
        new = self._draw(self.make_rng("params"), in_features) if draws else None

        # Flax calls it for a missing weight, and in `apply` to compare shapes; there `new` is None.
        def pick(rng: jax.Array, name: str) -> jax.Array:
            return getattr(self._draw(rng, in_features) if new is None else new, name)

        return type(shapes)(*(self.param(name, pick, name) for name in shapes._fields))

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> jax.Array:
        """The initial h, by `carry_init`: zeros by default.

        Args:
          rng: a key.
          input_shape: the shape of the input at one step, `[*batch, in_features]`.

        Returns:
          `[*batch, features]`.
        """
        return self.carry_init(rng, (*input_shape[:-1], self.features), self._carry_dtype())

    @nn.nowrap
    def _carry_dtype(self) -> Any:
        return self.param_dtype

    @property
    def num_feature_axes(self) -> int:
        """1, because only the last axis is that of the features."""
        return 1


class LRUCell(LinearCell):
    """A Linear Recurrent Unit: `fdc.lru_cell` with its weights as parameters.

    Its state is complex, its output real. Noise at its sites `candidate` and `hidden` comes from
    `RecurrentDropout(inside={site: ..})`; it draws nothing of its own.

    Args:
      features: the size of h and of the output.
      dtype: of the matrix products; None promotes that of inputs and weights. The state is
        complex64, or wider.
      param_dtype: of the weights.
      carry_init: makes the initial h.
      min_radius: as in `fdc.init_lru`.
      max_radius: as in `fdc.init_lru`, at most 1.
      max_phase: as in `fdc.init_lru`, in radians.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> cell, x = fdc.linen.LRUCell(8), jnp.ones((4, 3))
      >>> carry = cell.initialize_carry(jax.random.key(0), x.shape)
      >>> variables = cell.init(jax.random.key(1), carry, x)
      >>> h, y = cell.apply(variables, carry, x)
      >>> h.dtype, y.dtype, y.shape
      (dtype('complex64'), dtype('float32'), (4, 8))
    """

    min_radius: float = 0.0
    max_radius: float = 1.0
    max_phase: float = 2 * math.pi

    _run = staticmethod(cells.lru_cell)

    @nn.nowrap
    def _draw(self, rng: jax.Array, in_features: int) -> cells.LRUParams:
        return cells.init_lru(
            rng,
            in_features,
            self.features,
            self.param_dtype,
            min_radius=self.min_radius,
            max_radius=self.max_radius,
            max_phase=self.max_phase,
        )

    @nn.nowrap
    def _carry_dtype(self) -> Any:
        return complex_dtype(self.param_dtype)


class MinGRUCell(LinearCell):
    """A minGRU: `fdc.min_gru_cell` with its weights as parameters.

    Noise at its sites `candidate` and `hidden` comes from `RecurrentDropout(inside={site: ..})`;
    it draws nothing of its own.

    Args:
      features: the size of h.
      dtype: of the matrix product; None promotes that of inputs and weights.
      param_dtype: of the weights and of the initial h.
      carry_init: makes the initial h.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> spec = fdc.RecurrentDropout(inside={"candidate": fdc.Dropout(keep_prob=0.8)})
      >>> rnn, x = fdc.linen.RNN(fdc.linen.MinGRUCell(8), spec), jnp.ones((4, 20, 3))
      >>> variables = rnn.init(jax.random.key(0), x)
      >>> rnn.apply(variables, x, rng=jax.random.key(1)).shape
      (4, 20, 8)
    """

    _init = staticmethod(cells.init_min_gru)
    _run = staticmethod(cells.min_gru_cell)


class MinLSTMCell(LinearCell):
    """A minLSTM: `fdc.min_lstm_cell` with its weights as parameters.

    Noise at its sites `candidate` and `hidden` comes from `RecurrentDropout(inside={site: ..})`;
    it draws nothing of its own.

    Args:
      features: the size of h, which is the whole carry.
      dtype: of the matrix product; None promotes that of inputs and weights.
      param_dtype: of the weights and of the initial h.
      carry_init: makes the initial h.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> spec = fdc.RecurrentDropout(inside={"candidate": fdc.Dropout(keep_prob=0.8)})
      >>> rnn, x = fdc.linen.RNN(fdc.linen.MinLSTMCell(8), spec), jnp.ones((4, 20, 3))
      >>> variables = rnn.init(jax.random.key(0), x)
      >>> rnn.apply(variables, x, rng=jax.random.key(1)).shape
      (4, 20, 8)
    """

    _init = staticmethod(cells.init_min_lstm)
    _run = staticmethod(cells.min_lstm_cell)


class RGLRUCell(LinearCell):
    """A Real-Gated Linear Recurrent Unit: `fdc.rg_lru_cell` with its weights as parameters.

    Noise at its sites `candidate` and `hidden` comes from `RecurrentDropout(inside={site: ..})`;
    it draws nothing of its own.

    Args:
      features: the size of h.
      dtype: of the matrix product; None promotes that of inputs and weights.
      param_dtype: of the weights and of the initial h.
      carry_init: makes the initial h.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> spec = fdc.RecurrentDropout(inside={"candidate": fdc.Dropout(keep_prob=0.8)})
      >>> rnn, x = fdc.linen.RNN(fdc.linen.RGLRUCell(8), spec), jnp.ones((4, 20, 3))
      >>> variables = rnn.init(jax.random.key(0), x)
      >>> rnn.apply(variables, x, rng=jax.random.key(1)).shape
      (4, 20, 8)
    """

    _init = staticmethod(cells.init_rg_lru)
    _run = staticmethod(cells.rg_lru_cell)
