"""`DropoutCell`: an NNX cell under recurrent dropout."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx

from .._flax.carry import DropoutCarry, check_carry, inner_rng, run_step
from .._flax.wrapper import CellWrapper
from .._inside import trace_cell
from .._random.keys import nested_rng
from .._shown import shown
from .._sites import PyTree, RecurrentDropout
from .._trees import shape_of
from .dropout_attribute import DropoutAttribute
from .functional import call_with_params, functional_cell, params_of
from .streams import RngSource, fork_stream, key_of

_static = getattr(nnx, "static", lambda value: value)  # Flax 0.11 tells by the value


class Wrapper(CellWrapper, nnx.RNNCellBase):
    """What both wrappers share. A subclass says the noises."""

    _lstm_cells = (nnx.LSTMCell, nnx.OptimizedLSTMCell)

    def __init__(self, cell: nnx.RNNCellBase, deterministic: bool, rngs: RngSource) -> None:
        check_cell(cell)
        self.cell = cell
        self.deterministic = deterministic
        self.rngs: nnx.RngStream | None = fork_stream(rngs)

    if not TYPE_CHECKING:

        def __setattr__(self, name: str, value: Any) -> None:
            if name not in vars(self) and _is_state(value) and _cell_has(self, name):
                # What nnx.update finds no place for: state of the bare cell. NNX names it by where
                # it stands, and the cell stands one level further in.
                nnx.update(_unwrap(self), {name: value})
            else:
                if _is_array(value) != _is_array(vars(self).get(name)):
                    # Flax lets an attribute be data, or static, and no longer the other.
                    value = nnx.data(value) if _is_array(value) else _static(value)
                super().__setattr__(name, value)

    def _sequence_rng(self) -> jax.Array | None:
        """The key of a new sequence; None where it is to run without dropout."""
        if self.deterministic:
            return None
        if self.rngs is None:
            raise ValueError(
                f"{type(self).__name__} needs a 'dropout' stream in training: make it with "
                f"rngs=nnx.Rngs(dropout=0), or evaluate with eval() or deterministic=True."
            )
        wrappers = sum(isinstance(node, Wrapper) for node in _chain(self.cell))
        return nested_rng(self.rngs(), wrappers)

    def initialize_carry(
        self, input_shape: Any, rngs: RngSource = None, carry_init: Any = None
    ) -> DropoutCarry:
        """The cell's first carry, with the masks of a new sequence.

        Draws the variational masks, once for all steps of the sequence, from this module's own
        `dropout` stream. Call it before the loop.

        Args:
          input_shape: the shape of the input at a step, `[*batch, *features]`, or a pytree of
            such shapes for nested inputs.
          rngs: handed to the cell's own `initialize_carry`, and used for nothing else: a host's
            stream starts from the same key each time that the host is made.
          carry_init: handed to the cell's own `initialize_carry`.

        Returns:
          The carry to start a sequence with.

        Raises:
          ValueError: there is no `dropout` stream, and this is not evaluation.
        """
        # Cells need not know carry_init; those of Flax 0.11 do not.
        given = () if carry_init is None else (carry_init,)
        cell_carry = self.cell.initialize_carry(input_shape, rngs, *given)
        return self._start(self._sequence_rng(), cell_carry, input_shape)

    def redraw_masks(
        self, carry: PyTree, inputs: PyTree, rngs: RngSource | jax.Array = None
    ) -> DropoutCarry:
        """Starts new masks on an old state.

        The state stays as the last step left it. What noise at `state` dropped there is dropped
        still, so the first step reads h through the old mask, and the second through the new one.
        Noise at `inside={"recurrent": ..}` leaves no such trace.

        Args:
          carry: this wrapper's last carry, or a carry of the wrapped cell, such as an encoder's
            in a decoder.
          inputs: the input of one step, `[*batch, *features]`, or its `jax.ShapeDtypeStruct`; a
            pytree for nested inputs.
          rngs: the key of the new sequence, or an `nnx.Rngs` or `nnx.RngStream` to take it from.
            None takes it from the module's own stream.

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
        inputs = jax.tree.map(shape_of, inputs)
        cell_carry = carry.cell_carry if isinstance(carry, DropoutCarry) else carry
        rng = None if rngs is None else key_of(rngs)
        if isinstance(self.cell, Wrapper):
            inner = None if rng is None else inner_rng(rng)
            cell_carry = self.cell.redraw_masks(cell_carry, inputs, inner)
        if rng is None or self.deterministic:
            rng = self._sequence_rng()
        return self._start(rng, cell_carry, inputs)

    def _params_shapes(self, cell_carry: PyTree, x: PyTree) -> PyTree:
        return params_of(self.cell, self._dropout(cell_carry).params)

    def _output_shapes(self, cell_carry: PyTree, x: PyTree) -> PyTree:
        return self._trace(cell_carry, x, frozenset())[0]

    def _trace(
        self, cell_carry: PyTree, x: PyTree, names: frozenset[str]
    ) -> tuple[PyTree, dict[str, PyTree]]:
        return trace_cell(functional_cell(self.cell), None, cell_carry, x, names)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Switches between training and evaluation; `nnx.view` calls it.

        Args:
          deterministic: True is evaluation.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def __call__(self, carry: DropoutCarry, inputs: PyTree) -> tuple[DropoutCarry, PyTree]:
        """One step of the wrapped cell, with noise."""
        check_carry(carry)
        dropout = self._dropout(carry.cell_carry)
        params = None
        if dropout.params is not None:
            params = params_of(self.cell, dropout.params)

        def cell(params: PyTree, carry: PyTree, x: PyTree, **sites: Any) -> tuple[PyTree, PyTree]:
            if params is None:
                return self.cell(carry, x, **sites)
            return call_with_params(self.cell, params, carry, x, **sites)

        return run_step(
            carry,
            inputs,
            cell=cell,
            params=params,
            dropout=dropout,
            deterministic=self.deterministic,
            values=lambda x: self._values(dropout, carry.cell_carry, jax.tree.map(shape_of, x)),
        )


class DropoutCell(DropoutAttribute, Wrapper):
    """An NNX cell under recurrent dropout; put it wherever the cell would go.

    In training it draws from its own `dropout` stream, once per sequence; evaluation, by
    `eval()`, `nnx.view` or `deterministic=True`, needs none.

    Its carry is a `DropoutCarry`. Handed on to a next window it keeps its masks, as one long
    sequence that was cut; `redraw_masks` starts new ones on it.

    NNX names weights by where they stand, and the cell stands one level further in. Still
    `nnx.update(model, weights)` takes the weights of the same model without the wrapper. The way
    back: `model.rnn.cell = model.rnn.cell.cell` takes the wrapper off.

    Args:
      cell: any `nnx.RNNCellBase`.
      dropout: which noise sits where. One noise for the whole `state` of an LSTM-family cell
        means h alone; to reach the memory c, name it: `state=(noise_c, noise_h)`. `params` takes
        a prefix of the cell's `nnx.Param`s as a plain dict. It may be set to another at any time:
        a new number makes `nnx.jit` retrace, another value of an array does not.
      deterministic: True is evaluation.
      rngs: where the masks come from, an `nnx.Rngs` or an `nnx.RngStream`; it is forked.

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

    def _check_dropout(self, dropout: Any) -> None:
        if not isinstance(dropout, RecurrentDropout):
            raise TypeError(
                f"dropout must be a RecurrentDropout, such as "
                f"RecurrentDropout(input=Dropout(keep_prob=0.8)), got {shown(dropout)}."
            )

    def _dropout(self, cell_carry: PyTree) -> RecurrentDropout:
        return self._place(self.dropout, cell_carry)


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray)


def _is_state(value: Any) -> bool:
    return isinstance(value, nnx.State | dict | nnx.Variable)


def _chain(cell: Any) -> Iterator[Any]:
    """A cell and, where it is a wrapper, what it wraps, down to the user's own."""
    while cell is not None:
        yield cell
        cell = vars(cell).get("cell") if isinstance(cell, Wrapper) else None


def _unwrap(cell: Any) -> Any:
    """The user's cell inside of all wrappers."""
    *_, innermost = _chain(cell)
    return innermost


def _cell_has(wrapper: Wrapper, name: str) -> bool:
    cell = _unwrap(wrapper)
    return cell is not wrapper and name in vars(cell)


def check_cell(cell: Any) -> None:
    """Refuses what is no cell of the framework."""
    if not (isinstance(cell, nnx.Module) and callable(cell) and hasattr(cell, "initialize_carry")):
        raise TypeError(
            f"{shown(cell)} is not an RNNCell of flax.nnx: give a cell such as "
            f"nnx.LSTMCell(32, 64, rngs=rngs), a module with initialize_carry and "
            f"__call__(carry, inputs)."
        )
