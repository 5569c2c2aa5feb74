"""TensorFlow's wrapper around linen cells."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from .._flax.carry import DropoutCarry
from .._flax.tensorflow.arguments import (
    KEEP_PROBS,
    TensorFlowWrapper,
    Visitor,
    check_arguments,
    check_inputs,
    feature_shapes,
)
from .._spec.recurrent_dropout import PyTree
from .dropout_cell import Wrapper
from .framework import LINEN


class RNNCellDropoutWrapper(TensorFlowWrapper, Wrapper):
    """TensorFlow's `tf.nn.RNNCellDropoutWrapper` for linen cells, with the same arguments.

    Masks come from the `dropout` stream: variational ones once per sequence, others at each step.

    Args:
      cell: any `nn.RNNCellBase`.
      input_keep_prob: the probability of keeping a unit of the inputs, a number or an array, as in
        `Dropout`.
      output_keep_prob: the same for the outputs.
      state_keep_prob: the same for the outgoing state. As in TensorFlow, a GRU's h then grows at
        every step; so does an LSTM's c if the visitor chooses it. For a GRU use the layer `RNN`
        with `recipes.gal2016`.
      variational_recurrent: whether one mask serves all steps of a sequence (Gal and Ghahramani
        2016, arXiv:1512.05287). Each example has its own mask; with `broadcast_dims=(0,)` the
        whole batch shares one, as in TensorFlow.
      input_size: not needed; if given, the inputs are checked against it.
      dtype: not needed; if given, the inputs are checked against it.
      seed: folded into the `dropout` stream.
      dropout_state_filter_visitor: called on the state and then on its parts; it chooses the
        parts that get dropout. The default leaves an LSTM's c alone.
      broadcast_dims: dims over which one mask is shared.
      deterministic: if True, this is evaluation.

    Raises:
      ValueError: if a keep_prob is outside [0, 1].
      TypeError: if `cell` is not an RNNCell, or an argument has the wrong type.

    Example:
      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> cell = fdc.linen.RNNCellDropoutWrapper(
      ...     nn.LSTMCell(64), input_keep_prob=0.8, state_keep_prob=0.9, variational_recurrent=True
      ... )
      >>> x = jnp.ones((4, 20, 32))
      >>> variables = nn.RNN(cell).init(jax.random.key(0), x)
      >>> nn.RNN(cell).apply(variables, x, rngs={"dropout": jax.random.key(1)}).shape
      (4, 20, 64)
    """

    _cell_class = nn.RNNCellBase
    _cell_modules = ("flax.linen", "flax_dropout_cell.linen")
    _no_config_arguments = ("parent", "name")

    cell: nn.RNNCellBase
    input_keep_prob: float | jax.Array = 1.0
    output_keep_prob: float | jax.Array = 1.0
    state_keep_prob: float | jax.Array = 1.0
    variational_recurrent: bool = False
    input_size: Any = None
    dtype: Any = None
    seed: int | np.integer | None = None
    dropout_state_filter_visitor: Visitor | None = None
    broadcast_dims: Sequence[int] = ()
    deterministic: bool = False

    def __post_init__(self) -> None:
        LINEN.check_cell(self.cell)
        keep_probs = {name: getattr(self, name) for name in KEEP_PROBS}
        check_arguments(keep_probs, self.seed, self.dropout_state_filter_visitor)
        super().__post_init__()

    def __call__(
        self, carry: DropoutCarry, inputs: PyTree, *, deterministic: bool | None = None
    ) -> tuple[DropoutCarry, PyTree]:
        """One step of the wrapped cell, with noise.

        Args:
          carry: this wrapper's carry.
          inputs: the input of the step.
          deterministic: if True, this is evaluation. None uses the module's own setting.

        Returns:
          `(carry, y)`.
        """
        check_inputs(inputs, self.input_size, self.dtype)
        return super().__call__(carry, inputs, deterministic=deterministic)

    @classmethod
    @nn.nowrap
    def from_config(
        cls, config: dict[str, Any], *, trusted: Sequence[str] = ()
    ) -> "RNNCellDropoutWrapper":
        """Makes the wrapper that `get_config` described.

        A config is data: it may name cells of flax.linen and of this library, and functions of
        arrays such as `jax.nn:relu`. Any other name is an error, and nothing of it is run.

        Args:
          config: a dict that `get_config` returned.
          trusted: modules whose own functions and cells the config may name as well, such as
            `("my_project",)`. They are imported, and functions that they define are called.

        Returns:
          The wrapper.

        Raises:
          ValueError: if the config is not a wrapper's, or uses a name that is not allowed.

        Example:
          >>> import flax.linen as nn
          >>> import flax_dropout_cell as fdc
          >>> config = fdc.linen.RNNCellDropoutWrapper(nn.GRUCell(8), 0.5).get_config()
          >>> config["cell"]
          {'class_name': 'flax.linen:GRUCell', 'config': {'features': 8}}
          >>> fdc.linen.RNNCellDropoutWrapper.from_config(config).wrapped_cell.features
          8
        """
        return cls(**cls._read_config(config, trusted))

    @nn.nowrap
    def _features(self) -> list[Any]:
        if self.input_size is not None:
            return [feature_shapes(self.input_size, self.cell.num_feature_axes)]
        if self.cell.num_feature_axes == 1:
            return [(1,), (2,)]  # a stock cell's sizes do not depend on the width of its inputs
        axes = f"{self.cell.num_feature_axes} feature axes"
        raise ValueError(f"sizes of {type(self.cell).__name__} depend on {axes}; give input_size.")

    @nn.nowrap
    def _arguments(self, cell: Any) -> dict[str, Any]:
        return {
            field.name: getattr(cell, field.name)
            for field in dataclasses.fields(cell)
            if field.init
            and field.name not in self._no_config_arguments
            and getattr(cell, field.name) is not field.default
        }
