"""`DropoutCell`: a linen cell under recurrent dropout."""

from typing import Any

import flax.linen as nn
import jax
from flax.core import unfreeze

from .._flax.carry import DropoutCarry, check_carry, inner_rng, run_step
from .._flax.wrapper import CellWrapper
from .._inside import trace_cell
from .._shown import shown
from .._sites import PyTree, RecurrentDropout, active_noises
from .._trees import shape_of
from .cell_field import CellField, copy_with_cell, waits_for_a_host
from .constant_fields import ConstantFields
from .weights import restrict, run_on, weights_of


class Wrapper(CellWrapper, nn.RNNCellBase):
    """What both wrappers share. A subclass has `cell` and `deterministic`, and says the noises."""

    _lstm_cells = (nn.LSTMCell, nn.OptimizedLSTMCell, nn.ConvLSTMCell)
    __fn_or_cls__ = ConstantFields()

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
    def _stream(self) -> nn.Module | None:
        """The module whose `dropout` stream this one draws from; None outside of any module."""
        # A cell that is made with parent=None inside a module's call is unbound, but the stream of
        # that module is at hand, while the key that a host gives there is a constant.
        module = self if self.scope is not None else nn.module._context.module_stack[-1]
        return None if module is None or module.scope is None else module

    @nn.nowrap
    def _sequence_rng(self, rng: jax.Array | None = None) -> jax.Array | None:
        """The key of a new sequence; None where it is to run without dropout."""
        if self.deterministic:
            return None
        if rng is not None:
            return rng
        module = self._stream()
        if module is None:
            raise ValueError("an unbound cell draws its masks from rng; got None.")
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
          rng: handed to the cell's own `initialize_carry`; an unbound cell, which draws from it,
            hands on another key that it derives.
          input_shape: the shape of the input at a step, `[*batch, *features]`, or a pytree of
            such shapes for nested inputs.

        Returns:
          The carry to start a sequence with.

        Raises:
          ValueError: there is no `dropout` stream, and this is neither evaluation nor `init`.
        """
        own = None
        if self._stream() is None and not self.deterministic:
            own, rng = rng, inner_rng(rng)
        cell_carry = self.cell.initialize_carry(rng, input_shape)
        return self._start(self._sequence_rng(own), cell_carry, input_shape)

    @nn.nowrap
    def redraw_masks(
        self, carry: PyTree, inputs: PyTree, rng: jax.Array | None = None
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
          rng: the key of the new sequence. None reads the `dropout` stream.

        Returns:
          The carry to start the next window with.

        Example:
          >>> import flax.linen as nn
          >>> import jax, jax.numpy as jnp
          >>> import flax_dropout_cell as fdc
          >>> noise = fdc.Dropout(keep_prob=0.8, variational=True)
          >>> cell = fdc.linen.DropoutCell(nn.LSTMCell(64), fdc.RecurrentDropout(input=noise))
          >>> state = (jnp.zeros((4, 64)), jnp.zeros((4, 64)))
          >>> carry = cell.redraw_masks(state, jnp.ones((4, 32)), rng=jax.random.key(0))
          >>> carry.masks.input.shape
          (4, 32)
        """
        cell_carry = carry.cell_carry if isinstance(carry, DropoutCarry) else carry
        if isinstance(self.cell, Wrapper):
            inner = None if rng is None else inner_rng(rng)
            cell_carry = self.cell.redraw_masks(cell_carry, inputs, inner)
        return self._start(self._sequence_rng(rng), cell_carry, jax.tree.map(shape_of, inputs))

    @nn.nowrap
    def _params_shapes(self, cell_carry: PyTree, x: PyTree) -> PyTree:
        if self.scope is not None and not self.is_initializing():
            return self._checked(weights_of(self.cell).tree)
        (_, variables), _ = _trace(self.cell, cell_carry, x, frozenset())
        return self._checked(unfreeze(nn.unbox(variables)).get("params", {}))

    @nn.nowrap
    def _checked(self, tree: PyTree) -> PyTree:
        if not jax.tree.leaves(tree):
            raise ValueError(
                f"dropout.params has noise, but {type(self.cell).__name__} has no weights, nothing "
                f"in the collection 'params', for it to sit on."
            )
        return tree

    @nn.nowrap
    def _output_shapes(self, cell_carry: PyTree, x: PyTree) -> PyTree:
        return self._trace(cell_carry, x, frozenset())[0]

    @nn.nowrap
    def _trace(
        self, cell_carry: PyTree, x: PyTree, names: frozenset[str]
    ) -> tuple[PyTree, dict[str, PyTree]]:
        (y, _), inside = _trace(self.cell, cell_carry, x, names)
        return y, inside

    def __call__(self, carry: DropoutCarry, inputs: PyTree) -> tuple[DropoutCarry, PyTree]:
        """One step of the wrapped cell, with noise."""
        check_carry(carry)
        initializing = self.is_initializing()
        dropout = self._dropout(carry.cell_carry)
        # During init there are no weights yet, and the cell is to run once.
        weights, params = None, None
        if active_noises(dropout.params) and not initializing:
            weights = weights_of(self.cell)
            params = self._checked(weights.tree)
            if carry.masks is not None and carry.masks.params is not None:
                params = restrict(params, carry.masks.params)

        def cell(params: PyTree, carry: PyTree, x: PyTree, **sites: Any) -> tuple[PyTree, PyTree]:
            if weights is None:
                return self.cell(carry, x, **sites)
            return run_on(self.cell, weights, params, carry, x, **sites)

        return run_step(
            carry,
            inputs,
            cell=cell,
            params=params,
            dropout=dropout,
            deterministic=self.deterministic or (initializing and carry.masks is None),
            disturb_params=weights is not None,
            values=lambda x: self._values(dropout, carry.cell_carry, jax.tree.map(shape_of, x)),
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
        means h alone; to reach the memory c, name it: `state=(noise_c, noise_h)`. Where another
        cell's state has several leaves, say which.
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
                f"RecurrentDropout(input=Dropout(keep_prob=0.8)), got {shown(self.dropout)}."
            )
        super().__post_init__()

    @nn.nowrap
    def _dropout(self, cell_carry: PyTree) -> RecurrentDropout:
        return self._place(self.dropout, cell_carry)


def check_cell(cell: Any) -> None:
    """Refuses what is no cell of the framework."""
    if not (isinstance(cell, nn.Module) and callable(cell) and hasattr(cell, "initialize_carry")):
        raise TypeError(
            f"{shown(cell)} is not an RNNCell of flax.linen: give a cell such as nn.LSTMCell(64), "
            f"a module with initialize_carry and __call__(carry, inputs)."
        )


def _trace(
    cell: nn.RNNCellBase, cell_carry: PyTree, x: PyTree, names: frozenset[str]
) -> tuple[tuple[PyTree, PyTree], dict[str, PyTree]]:
    """The shapes of a cell's output and variables, and of what stands at its sites `names`."""
    unbound = cell.clone(parent=None, _deep_clone=True, _reset_names=True)

    def run(params: None, carry: PyTree, x: PyTree, **sites: Any) -> tuple[PyTree, PyTree]:
        (carry, y), variables = unbound.init_with_output(jax.random.key(0), carry, x, **sites)
        return carry, (y, variables)

    return trace_cell(run, None, cell_carry, x, names)
