"""`DropoutCell`: an NNX cell under recurrent dropout."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from .._arguments import check_flag
from .._flax.carry import DropoutCarry
from .._flax.compat import data_or_static
from .._flax.deterministic import is_evaluation
from .._flax.wrapper import CellWrapper
from .._random.keys import nested_rng
from .._spec.prefixes import shape_of
from .._spec.recurrent_dropout import PyTree, RecurrentDropout
from ..noises.protocol import is_array
from .dropout_attribute import DropoutAttribute
from .framework import NNX_FRAMEWORK
from .streams import RngSource, dropout_key, fork_stream
from .switchable import Switchable


class Wrapper(CellWrapper, Switchable, nnx.RNNCellBase):
    """Shared by both wrappers. A subclass adds its noises."""

    _framework = NNX_FRAMEWORK

    def __init__(self, cell: nnx.RNNCellBase, deterministic: bool, rngs: RngSource) -> None:
        NNX_FRAMEWORK.check_cell(cell)
        self._wrapped = cell
        self.deterministic = check_flag("deterministic", deterministic)
        # Not `rngs`: a bare cell may keep a stream there, and its state is loaded into this module.
        self.dropout_stream: nnx.RngStream | None = fork_stream(rngs)

    if not TYPE_CHECKING:

        def __setattr__(self, name: str, value: Any) -> None:
            if _is_state(value) and self._belongs_to_the_cell(name):
                # nnx.update sets the bare cell's state here: the cell is one level deeper than its
                # path says.
                cell = _unwrap(self)
                of_cell = name in vars(cell) and _fits(value, vars(cell)[name])
                nnx.update(cell, {name: value} if of_cell or name != "cell" else value)
            elif name == "cell":
                super().__setattr__("_wrapped", value)
            else:
                if is_array(value) != is_array(vars(self).get(name)):
                    # Flax lets an attribute be data, or static, and no longer the other.
                    value = data_or_static(value)
                super().__setattr__(name, value)

    def _belongs_to_the_cell(self, name: str) -> bool:
        if name in vars(self) or "_wrapped" not in vars(self):
            return False
        return name == "cell" or name in vars(_unwrap(self))

    @property
    def cell(self) -> Any:
        """The wrapped cell."""
        # Not an attribute of that name: nnx.update would take the state of a cell that the bare
        # cell holds as its own field `cell` for the bare cell's, and add it there as new fields.
        return self._wrapped

    def _sequence_rng(
        self, cell_carry: PyTree, rng: jax.Array | None = None, deterministic: bool | None = None
    ) -> jax.Array | None:
        """The key of a new sequence; None if it runs without dropout."""
        if not self._draws(cell_carry, deterministic):
            return None
        if rng is not None:
            return rng
        wrappers = sum(isinstance(node, Wrapper) for node in _chain(self.cell))
        return nested_rng(self._key(None, self.dropout_stream), wrappers)

    def _key(self, rngs: Any, own: nnx.RngStream | None) -> jax.Array:
        return dropout_key(type(self).__name__, rngs, own, takes="rngs=key to redraw_masks")

    def initialize_carry(
        self, input_shape: Any, rngs: RngSource = None, carry_init: Any = None
    ) -> DropoutCarry:
        """The cell's initial carry, with the masks of a new sequence.

        Draws the variational masks, once for all steps of the sequence, from this module's own
        `dropout` stream. Call it before the loop.

        Args:
          input_shape: the shape of the input at a step, `[*batch, *features]`, or a pytree of
            such shapes for nested inputs.
          rngs: passed to the cell's own `initialize_carry`, and used for nothing else, because
            `nnx.RNN` starts this stream from the same key each time that it is made.
          carry_init: passed to the cell's own `initialize_carry`.

        Returns:
          The carry to start a sequence with.

        Raises:
          ValueError: in training, if there is no `dropout` stream.
        """
        # Cells need not know carry_init; those of Flax 0.11 do not.
        given = () if carry_init is None else (carry_init,)
        cell_carry = self.cell.initialize_carry(input_shape, rngs, *given)
        return self._start(self._sequence_rng(cell_carry), cell_carry, input_shape)

    def redraw_masks(
        self,
        carry: PyTree,
        inputs: PyTree,
        rngs: RngSource | jax.Array = None,
        *,
        deterministic: bool | None = None,
    ) -> DropoutCarry:
        """Draws the masks of a new sequence and keeps the state of the old one.

        The state does not change: units that noise at `state` dropped at the last step are still
        zero, so the first step reads h through the old mask and the second through the new one.
        Noise at `inside={"recurrent": ..}` leaves no such trace.

        Args:
          carry: this wrapper's last carry, or a carry of the wrapped cell, such as an encoder's
            in a decoder.
          inputs: the input of one step, `[*batch, *features]`, or its `jax.ShapeDtypeStruct`; a
            pytree for nested inputs.
          rngs: the key of the new sequence, or an `nnx.Rngs` or `nnx.RngStream` to take it from.
            None takes it from the module's own stream.
          deterministic: if True, this is evaluation. None uses the module's own setting.

        Returns:
          The carry to start the next window with.

        Example:
          >>> from flax import nnx
          >>> import jax, jax.numpy as jnp
          >>> import flax_dropout_cell as fdc
          >>> noise = fdc.Dropout(keep_prob=0.8, variational=True)
          >>> cell = nnx.LSTMCell(32, 64, rngs=nnx.Rngs(0))
          >>> cell = fdc.nnx.DropoutCell(cell, fdc.RecurrentDropout(input=noise))
          >>> state = (jnp.zeros((4, 64)), jnp.zeros((4, 64)))
          >>> carry = cell.redraw_masks(state, jnp.ones((4, 32)), rngs=jax.random.key(0))
          >>> carry.masks.input.shape
          (4, 32)
        """
        # In evaluation nothing is drawn, so the stream does not advance. A wrapper inside may train
        # even if this one does not.
        wrappers = (node for node in _chain(self) if isinstance(node, Wrapper))
        trains = any(not is_evaluation(deterministic, node.deterministic) for node in wrappers)
        rng = self._key(rngs, None) if rngs is not None and trains else None
        return self._redraw(carry, jax.tree.map(shape_of, inputs), rng, deterministic)

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
        return self._step(carry, inputs, deterministic)


class DropoutCell(DropoutAttribute, Wrapper):
    """An NNX cell under recurrent dropout; use it in place of the cell.

    In training it draws from its own `dropout` stream, once per sequence; evaluation, by
    `eval()`, `nnx.view` or `deterministic=True`, needs none.

    Its carry is a `DropoutCarry`. A carry that is passed to the next window keeps its masks, as if
    one long sequence had been cut; `redraw_masks` starts new masks.

    In NNX a weight's name is its path, and the wrapped cell is one level deeper. Still,
    `nnx.update(model, weights)` takes the weights of the same model without the wrapper. To remove
    the wrapper, write `model.rnn.cell = model.rnn.cell.cell`.

    Args:
      cell: any `nnx.RNNCellBase`.
      dropout: the noise at each site. One noise for the whole `state` of an LSTM-family cell
        means h alone; for c as well, write `state=(noise_c, noise_h)`. If another cell's state has
        several leaves, give a structure. `params` takes a prefix of the cell's parameters
        (`nnx.Param`) as a plain dict. The attribute may be replaced at any time: a new number makes
        `nnx.jit` retrace, another value of an array does not.
      deterministic: if True, this is evaluation.
      rngs: the source of the masks, an `nnx.Rngs` or an `nnx.RngStream`; it is forked.

    Raises:
      TypeError: if `cell` is not a cell, `dropout` is not a `RecurrentDropout`, or `rngs` is a key.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> noise = fdc.Dropout(keep_prob=0.8, variational=True)
      >>> dropout = fdc.RecurrentDropout(input=noise, state=noise)
      >>> rngs = nnx.Rngs(params=0, dropout=1)
      >>> cell = nnx.LSTMCell(32, 64, rngs=rngs)
      >>> rnn = nnx.RNN(fdc.nnx.DropoutCell(cell, dropout, rngs=rngs))
      >>> rnn(jnp.ones((4, 20, 32))).shape
      (4, 20, 64)
    """

    def __init__(
        self,
        cell: nnx.RNNCellBase,
        dropout: RecurrentDropout,
        deterministic: bool = False,
        *,
        rngs: RngSource = None,
    ) -> None:
        super().__init__(cell, deterministic, rngs)
        self.dropout = dropout

    def _spec_for(self, cell_carry: PyTree) -> RecurrentDropout:
        return self._resolve_noise(self.dropout, cell_carry)


def _is_state(value: Any) -> bool:
    return isinstance(value, nnx.State | dict | nnx.Variable)


def _chain(cell: Any) -> Iterator[Any]:
    """A cell, the cell that it wraps, and so on, down to the user's own."""
    while cell is not None:
        yield cell
        cell = vars(cell).get("_wrapped") if isinstance(cell, Wrapper) else None


def _unwrap(cell: Any) -> Any:
    """The user's cell inside of all wrappers."""
    *_, innermost = _chain(cell)
    return innermost


def _fits(state: Any, node: Any) -> bool:
    """Whether a state's names are all attributes of a node; a variable has none."""
    names = state if isinstance(state, nnx.State | dict) else ()
    return all(not hasattr(node, "__dict__") or name in vars(node) for name in names)
