"""TensorFlow's wrapper around NNX cells."""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from .._flax.carry import DropoutCarry
from .._flax.tensorflow.arguments import (
    KEEP_PROBS,
    TensorFlowWrapper,
    Visitor,
    check_arguments,
    check_inputs,
    feature_shapes,
)
from .._flax.tensorflow.configs import constructor_parameters
from .._spec.recurrent_dropout import PyTree
from .dropout_attribute import Static
from .dropout_cell import Wrapper
from .streams import RngSource


class RNNCellDropoutWrapper(TensorFlowWrapper, Wrapper):
    """TensorFlow's `tf.nn.RNNCellDropoutWrapper` for NNX cells, with the same arguments.

    Masks come from the module's own `dropout` stream: variational ones once per sequence, others
    at each step.

    Args:
      cell: any `nnx.RNNCellBase`.
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
      rngs: the source of the masks, an `nnx.Rngs` or an `nnx.RngStream`; it is forked.

    Raises:
      ValueError: if a keep_prob is outside [0, 1].
      TypeError: if `cell` is not an RNNCell, or an argument has the wrong type.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> rngs = nnx.Rngs(params=0, dropout=1)
      >>> cell = fdc.nnx.RNNCellDropoutWrapper(
      ...     nnx.LSTMCell(32, 64, rngs=rngs), input_keep_prob=0.8, state_keep_prob=0.9,
      ...     variational_recurrent=True, rngs=rngs,
      ... )
      >>> nnx.RNN(cell)(jnp.ones((4, 20, 32))).shape
      (4, 20, 64)
    """

    _cell_class = nnx.RNNCellBase
    _cell_modules = ("flax.nnx", "flax_dropout_cell.nnx")
    _no_config_arguments = ("rngs",)

    def __init__(
        self,
        cell: nnx.RNNCellBase,
        input_keep_prob: float | jax.Array = 1.0,
        output_keep_prob: float | jax.Array = 1.0,
        state_keep_prob: float | jax.Array = 1.0,
        variational_recurrent: bool = False,
        input_size: Any = None,
        dtype: Any = None,
        seed: int | np.integer | None = None,
        dropout_state_filter_visitor: Visitor | None = None,
        broadcast_dims: Sequence[int] = (),
        deterministic: bool = False,
        *,
        rngs: RngSource = None,
    ) -> None:
        super().__init__(cell, deterministic, rngs)
        self.input_keep_prob = input_keep_prob
        self.output_keep_prob = output_keep_prob
        self.state_keep_prob = state_keep_prob
        keep_probs = {name: getattr(self, name) for name in KEEP_PROBS}
        check_arguments(keep_probs, seed, dropout_state_filter_visitor)
        self.variational_recurrent = variational_recurrent
        self._input_size = Static(input_size)
        self.dtype = dtype
        self.seed = seed
        self.dropout_state_filter_visitor = dropout_state_filter_visitor
        # The noises refuse what is not a sequence.
        is_sequence = isinstance(broadcast_dims, Iterable)
        self.broadcast_dims = tuple(broadcast_dims) if is_sequence else broadcast_dims

    @property
    def input_size(self) -> Any:
        """The feature sizes that the inputs must have, or None."""
        return self._input_size.tree

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
    def from_config(
        cls,
        config: dict[str, Any],
        rngs: nnx.Rngs | None = None,
        *,
        trusted: Sequence[str] = (),
    ) -> "RNNCellDropoutWrapper":
        """Makes the wrapper that `get_config` described, with new weights.

        A config is data: it may name cells of flax.nnx and of this library, and functions of
        arrays such as `jax.nn:relu`. Any other name is an error, and nothing of it is run.

        Args:
          config: a dict that `get_config` returned.
          rngs: the source of the cell's weights and of the masks.
          trusted: modules whose own functions and cells the config may name as well, such as
            `("my_project",)`. They are imported, and functions that they define are called.

        Returns:
          The wrapper, with new weights.

        Raises:
          ValueError: if the config is not a wrapper's, or uses a name that is not allowed, or if
            the cell has weights to make and `rngs` is None.

        Example:
          >>> from flax import nnx
          >>> import flax_dropout_cell as fdc
          >>> cell = nnx.GRUCell(3, 8, rngs=nnx.Rngs(0))
          >>> config = fdc.nnx.RNNCellDropoutWrapper(cell, 0.5).get_config()
          >>> wrapper = fdc.nnx.RNNCellDropoutWrapper.from_config(config, nnx.Rngs(1))
          >>> wrapper.wrapped_cell.hidden_features
          8
        """
        return cls(**cls._read_config(config, trusted, rngs=rngs), rngs=rngs)

    def _features(self) -> list[Any]:
        if self.input_size is not None:
            return [feature_shapes(self.input_size, self.cell.num_feature_axes)]
        cell = self.cell
        while isinstance(cell, Wrapper):
            cell = cell.cell
        if hasattr(cell, "in_features"):
            return [(cell.in_features,)]
        raise ValueError(f"{type(cell).__name__} has no in_features; give input_size.")

    def _arguments(self, cell: Any) -> dict[str, Any]:
        return {
            parameter.name: getattr(cell, parameter.name)
            for parameter in constructor_parameters(type(cell))
            if _is_kept(cell, parameter) and getattr(cell, parameter.name) is not parameter.default
        }


def _is_kept(cell: nnx.RNNCellBase, parameter: inspect.Parameter) -> bool:
    """Whether a cell has an argument of its constructor as an attribute."""
    name = parameter.name
    if name in RNNCellDropoutWrapper._no_config_arguments or parameter.kind in (
        parameter.VAR_POSITIONAL,
        parameter.VAR_KEYWORD,
    ):
        return False
    if hasattr(cell, name):
        return True
    # The cells of Flax 0.12 forget how their weights were made.
    if name == "keep_rngs" or name.endswith(("_init", "_metadata")):
        return False
    problem = f"{type(cell).__name__} takes {name} and has no attribute of that name"
    raise ValueError(f"{problem}; set self.{name} in __init__, or write get_config.")
