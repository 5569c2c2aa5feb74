"""This library's linear cells as NNX cells; their weights have the core's names."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from .. import cells
from .._flax.cell_weights import complex_dtype, promote
from ..cells.disturb import Disturb, undisturbed
from .streams import check_rngs


class LinearCell(nnx.RNNCellBase):
    """Shared by the linear cells: a cell of the core, with its weights as parameters."""

    _params: Any
    _init: Callable[..., Any]
    _run: Callable[..., Any]

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        check_rngs(rngs)
        params = self._init(rngs.params(), in_features, hidden_features, param_dtype, **options)
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.dtype = dtype
        self.param_dtype = param_dtype
        for name, weight in params._asdict().items():
            setattr(self, name, nnx.Param(weight))

    def __call__(
        self, carry: jax.Array, inputs: jax.Array, *, disturb: Disturb = undisturbed
    ) -> tuple[jax.Array, jax.Array]:
        """One step.

        Args:
          carry: h, `[*batch, hidden_features]`.
          inputs: `[*batch, in_features]`.
          disturb: called at each site inside.

        Returns:
          `(h, y)`: the new h and the output, each `[*batch, hidden_features]`.
        """
        x, params = promote(inputs, self.weights(), self.dtype)
        return self._run(params, carry, x, disturb=disturb)

    def weights(self) -> Any:
        """The weights, as the core has them."""
        return self._params(*(getattr(self, name)[...] for name in self._params._fields))

    def initialize_carry(
        self,
        input_shape: tuple[int, ...],
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        carry_init: Initializer | None = None,
    ) -> jax.Array:
        """The initial h: zeros, or by `carry_init`.

        Args:
          input_shape: the shape of the input at one step, `[*batch, in_features]`.
          rngs: the source of the key for `carry_init`; zeros need none.
          carry_init: makes the initial h.

        Returns:
          `[*batch, hidden_features]`.

        Raises:
          ValueError: if `carry_init` has no `rngs` to take a key from.
        """
        shape = (*input_shape[:-1], self.hidden_features)
        if carry_init is None:
            return jnp.zeros(shape, self._carry_dtype())
        # nnx.RNN passes on a stream, users pass an Rngs.
        stream = rngs.carry if isinstance(rngs, nnx.Rngs) else rngs
        if stream is None:
            raise ValueError("carry_init needs rngs, such as nnx.Rngs(0).")
        return carry_init(stream(), shape, self._carry_dtype())

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
      in_features: the size of x.
      hidden_features: the size of h and of the output.
      dtype: of the matrix products; None promotes that of inputs and weights. The state is
        complex64, or wider.
      param_dtype: of the weights.
      min_radius: as in `fdc.init_lru`.
      max_radius: as in `fdc.init_lru`, at most 1.
      max_phase: as in `fdc.init_lru`, in radians.
      rngs: the source of the initial weights.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> cell, x = fdc.nnx.LRUCell(3, 8, rngs=nnx.Rngs(0)), jnp.ones((4, 3))
      >>> h, y = cell(cell.initialize_carry(x.shape), x)
      >>> h.dtype, y.dtype, y.shape
      (dtype('complex64'), dtype('float32'), (4, 8))
    """

    _params = cells.LRUParams
    _init = staticmethod(cells.init_lru)
    _run = staticmethod(cells.lru_cell)

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        min_radius: float = 0.0,
        max_radius: float = 1.0,
        max_phase: float = 2 * math.pi,
        rngs: nnx.Rngs,
    ) -> None:
        self.min_radius, self.max_radius, self.max_phase = min_radius, max_radius, max_phase
        options = {"min_radius": min_radius, "max_radius": max_radius, "max_phase": max_phase}
        super().__init__(
            in_features,
            hidden_features,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
            **options,
        )

    def _carry_dtype(self) -> Any:
        return complex_dtype(self.param_dtype)


class MinGRUCell(LinearCell):
    """A minGRU: `fdc.min_gru_cell` with its weights as parameters.

    Noise at its sites `candidate` and `hidden` comes from `RecurrentDropout(inside={site: ..})`;
    it draws nothing of its own.

    Args:
      in_features: the size of x.
      hidden_features: the size of h.
      dtype: of the matrix product; None promotes that of inputs and weights.
      param_dtype: of the weights and of the initial h.
      rngs: the source of the initial weights.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> cell = fdc.nnx.MinGRUCell(3, 8, rngs=nnx.Rngs(0))
      >>> spec = fdc.RecurrentDropout(inside={"candidate": fdc.Dropout(keep_prob=0.8)})
      >>> rnn = fdc.nnx.RNN(cell, spec, rngs=nnx.Rngs(dropout=1))
      >>> rnn(jnp.ones((4, 20, 3))).shape
      (4, 20, 8)
    """

    _params = cells.MinGRUParams
    _init = staticmethod(cells.init_min_gru)
    _run = staticmethod(cells.min_gru_cell)


class MinLSTMCell(LinearCell):
    """A minLSTM: `fdc.min_lstm_cell` with its weights as parameters.

    Noise at its sites `candidate` and `hidden` comes from `RecurrentDropout(inside={site: ..})`;
    it draws nothing of its own.

    Args:
      in_features: the size of x.
      hidden_features: the size of h, which is the whole carry.
      dtype: of the matrix product; None promotes that of inputs and weights.
      param_dtype: of the weights and of the initial h.
      rngs: the source of the initial weights.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> cell = fdc.nnx.MinLSTMCell(3, 8, rngs=nnx.Rngs(0))
      >>> spec = fdc.RecurrentDropout(inside={"candidate": fdc.Dropout(keep_prob=0.8)})
      >>> rnn = fdc.nnx.RNN(cell, spec, rngs=nnx.Rngs(dropout=1))
      >>> rnn(jnp.ones((4, 20, 3))).shape
      (4, 20, 8)
    """

    _params = cells.MinLSTMParams
    _init = staticmethod(cells.init_min_lstm)
    _run = staticmethod(cells.min_lstm_cell)


class RGLRUCell(LinearCell):
    """A Real-Gated Linear Recurrent Unit: `fdc.rg_lru_cell` with its weights as parameters.

    Noise at its sites `candidate` and `hidden` comes from `RecurrentDropout(inside={site: ..})`;
    it draws nothing of its own.

    Args:
      in_features: the size of x.
      hidden_features: the size of h.
      dtype: of the matrix product; None promotes that of inputs and weights.
      param_dtype: of the weights and of the initial h.
      rngs: the source of the initial weights.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> cell = fdc.nnx.RGLRUCell(3, 8, rngs=nnx.Rngs(0))
      >>> spec = fdc.RecurrentDropout(inside={"candidate": fdc.Dropout(keep_prob=0.8)})
      >>> rnn = fdc.nnx.RNN(cell, spec, rngs=nnx.Rngs(dropout=1))
      >>> rnn(jnp.ones((4, 20, 3))).shape
      (4, 20, 8)
    """

    _params = cells.RGLRUParams
    _init = staticmethod(cells.init_rg_lru)
    _run = staticmethod(cells.rg_lru_cell)
