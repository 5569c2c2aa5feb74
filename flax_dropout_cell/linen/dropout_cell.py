"""`DropoutCell`: a linen cell under recurrent dropout."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax

from .._flax.carry import DropoutCarry, run_step
from .._flax.wrapper import CellWrapper
from .._sites import PyTree, RecurrentDropout
from .cell_field import CellField, copy_with_cell, waits_for_a_host


class Wrapper(CellWrapper, nn.RNNCellBase):
    """What both wrappers share. A subclass has `cell` and `deterministic`, and says the noises."""

    _lstm_cells = (nn.LSTMCell, nn.OptimizedLSTMCell, nn.ConvLSTMCell)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # After Flax's own work on the class, which would wrap the descriptor in another.
        cls.cell = CellField()

    def __post_init__(self) -> None:
        if waits_for_a_host(self, self.cell):
            object.__setattr__(self, "parent", None)
        super().__post_init__()

    @nn.nowrap
    def copy(self, **kwargs: Any) -> Any:
        """Creates a copy of this module, as `nn.Module.copy` does for the bare cell."""
        return copy_with_cell(self, self.cell, **kwargs)

    @nn.nowrap
    def _sequence_rng(self, rng: jax.Array | None) -> jax.Array | None:
        """The key of a new sequence; None where it is to run without dropout."""
        if self.deterministic:
            return None
        # A cell that is made with parent=None inside a module's call is unbound, but the stream of
        # that module is at hand, while the key that a host gives there is a constant.
        module = self if self.scope is not None else nn.module._context.module_stack[-1]
        if module is None or module.scope is None:
            if rng is None:
                raise ValueError("an unbound cell draws its masks from rng; got None.")
            return rng
        if module.has_rng("dropout"):
            return module.make_rng("dropout")
        if module.is_initializing():
            return None
        raise ValueError(
            f"{type(self).__name__} needs a 'dropout' stream in training: pass "
            f"rngs={{'dropout': key}} to apply, or make it with deterministic=True to evaluate. "
            f"Inside nn.scan the stream needs split_rngs={{'dropout': True}}; better, call "
            f"initialize_carry before the scan."
        )

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: Any) -> DropoutCarry:
        """The cell's first carry, with the masks of a new sequence.

        Draws the variational masks, once for all steps of the sequence, from the `dropout`
        stream. A cell that is unbound and is called outside of any module has no stream and
        draws from `rng`: give it a new key for each sequence.

        Args:
          rng: handed to the cell's own `initialize_carry`.
          input_shape: the shape of the input at a step, `[*batch, *features]`, or a pytree of
            such shapes for nested inputs.

        Returns:
          The carry to start a sequence with.

        Raises:
          ValueError: there is no `dropout` stream, and this is neither evaluation nor `init`.
        """
        cell_carry = self.cell.initialize_carry(rng, input_shape)
        return self._start(self._sequence_rng(rng), cell_carry, input_shape)

    @nn.nowrap
    def redraw_masks(self, rng: jax.Array | None, carry: PyTree, input_shape: Any) -> DropoutCarry:
        """Starts new masks on an old state, as Gal and Ghahramani do from window to window.

        Args:
          rng: as in `initialize_carry`; None where there is a `dropout` stream.
          carry: this wrapper's last carry, or a carry of the wrapped cell.
          input_shape: as in `initialize_carry`.

        Returns:
          The carry to start the next window with.
        """
        cell_carry = carry.cell_carry if isinstance(carry, DropoutCarry) else carry
        if isinstance(self.cell, Wrapper):
            cell_carry = self.cell.redraw_masks(rng, cell_carry, input_shape)
        return self._start(self._sequence_rng(rng), cell_carry, input_shape)

    @nn.nowrap
    def _parts(self) -> Iterable[Any]:
        for field in dataclasses.fields(self.cell):
            if field.name != "parent":
                yield from jax.tree.leaves(getattr(self.cell, field.name, None))

    @nn.nowrap
    def _params_shapes(self, cell_carry: PyTree, x: PyTree) -> PyTree:
        _, variables = _trace_cell(self.cell, cell_carry, x)
        return nn.unbox(variables).get("params")

    @nn.nowrap
    def _output_shapes(self, cell_carry: PyTree, x: PyTree) -> PyTree:
        (_, y), _ = _trace_cell(self.cell, cell_carry, x)
        return y

    def __call__(self, carry: DropoutCarry, inputs: PyTree) -> tuple[DropoutCarry, PyTree]:
        """One step of the wrapped cell, with noise."""
        no_masks = isinstance(carry, DropoutCarry) and carry.masks is None
        evaluate = self.deterministic or (self.is_initializing() and no_masks)
        dropout = RecurrentDropout()
        if isinstance(carry, DropoutCarry):
            dropout = self._dropout(carry.cell_carry)
        params = None
        if dropout.params is not None and not evaluate:
            if self.is_initializing():
                self.cell(carry.cell_carry, inputs)  # makes the weights that are to be disturbed
            params = self.cell.variables["params"]

        else:
            dropout = dataclasses.replace(dropout, params=None)

        def cell(params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
            if params is None:
                return self.cell(carry, x)
            run = nn.map_variables(_call, "params", lambda _: {"params": params})
            return run(self.cell, carry, x)

        return run_step(
            carry, inputs, cell=cell, params=params, dropout=dropout, deterministic=evaluate
        )


class DropoutCell(Wrapper):
    """A Flax cell under recurrent dropout; put it wherever the cell would go.

    In training it reads the `dropout` stream, once per sequence; `init` and evaluation need none.
    The cell's weights keep their names in `nn.RNN`.

    Its carry is a `DropoutCarry`. Handed on to a next window it keeps its masks, as one long
    sequence that was cut; `redraw_masks` starts new ones on it.

    Args:
      cell: any `nn.RNNCellBase`.
      dropout: which noise sits where. One noise for the whole `state` of an LSTM-family cell
        means h alone; to reach the memory c, name it: `state=(noise_c, noise_h)`.
      deterministic: True is evaluation.

    Example:
      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> noise = fdc.Dropout(keep_prob=0.8, variational=True)
      >>> dropout = fdc.RecurrentDropout(input=noise, state=noise)
      >>> rnn = nn.RNN(fdc.linen.DropoutCell(nn.LSTMCell(64), dropout))
      >>> x = jnp.ones((4, 20, 32))
      >>> variables = rnn.init(jax.random.key(0), x)
      >>> rnn.apply(variables, x, rngs={"dropout": jax.random.key(1)}).shape
      (4, 20, 64)
    """

    cell: nn.RNNCellBase
    dropout: RecurrentDropout
    deterministic: bool = False

    def __post_init__(self) -> None:
        check_cell(self.cell)
        if not isinstance(self.dropout, RecurrentDropout):
            raise TypeError(
                f"dropout must be a RecurrentDropout, such as "
                f"RecurrentDropout(input=Dropout(keep_prob=0.8)), got {self.dropout!r}."
            )
        super().__post_init__()

    @nn.nowrap
    def _dropout(self, cell_carry: PyTree) -> RecurrentDropout:
        return dataclasses.replace(self.dropout, state=self._place_state(self.dropout.state))


def _call(cell: nn.RNNCellBase, *args: Any) -> Any:
    return cell(*args)


def check_cell(cell: Any) -> None:
    if not (isinstance(cell, nn.Module) and callable(cell) and hasattr(cell, "initialize_carry")):
        raise TypeError(
            f"{cell!r} is not an RNNCell of flax.linen: give a cell such as nn.LSTMCell(64), "
            f"a module with initialize_carry and __call__(carry, inputs)."
        )


def _trace_cell(cell: nn.RNNCellBase, cell_carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
    """The shapes of what a cell returns and of its variables."""
    unbound = cell.clone(parent=None, _deep_clone=True, _reset_names=True)
    return jax.eval_shape(unbound.init_with_output, jax.random.key(0), cell_carry, x)
