"""`DropoutCell`: a linen cell under recurrent dropout."""

from typing import Any

import flax.linen as nn
import jax

from .._flax.carry import DropoutCarry
from .._flax.compat import (
    CellField,
    HashedFields,
    copy_with_cell,
    running_module,
    should_stay_unbound,
)
from .._flax.wrapper import CellWrapper
from .._random.keys import cell_rng
from .._spec.prefixes import shape_of
from .._spec.recurrent_dropout import PyTree, RecurrentDropout
from .._step.checks import check_dropout
from .framework import LINEN
from .streams import dropout_key


class Wrapper(CellWrapper, nn.RNNCellBase):
    """Shared by both wrappers. A subclass has `cell`, `deterministic` and its noises."""

    _framework = LINEN
    __fn_or_cls__ = HashedFields()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # After Flax's own work on the class, which would wrap the descriptor in another.
        cls.cell = CellField()

    def __post_init__(self) -> None:
        if should_stay_unbound(self, self.cell):
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
        module = self if self.scope is not None else running_module()
        return None if module is None or module.scope is None else module

    @nn.nowrap
    def _sequence_rng(
        self, cell_carry: PyTree, rng: jax.Array | None, deterministic: bool | None = None
    ) -> jax.Array | None:
        """The key of a new sequence; None if it runs without dropout."""
        if not self._draws(cell_carry, deterministic):
            return None
        if rng is not None:
            return rng
        module = self._stream()
        if module is None:
            raise ValueError(
                "a cell outside of apply has no 'dropout' stream: pass a key, as in "
                "redraw_masks(carry, inputs, key)."
            )
        return dropout_key(module, None, type(self).__name__, at_call=False)

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: Any) -> DropoutCarry:
        """The cell's initial carry, with the masks of a new sequence.

        Draws the variational masks, once for all steps of the sequence, from the `dropout`
        stream. A cell that is unbound and is called outside of any module has no stream and
        draws from `rng`: give it a new key for each sequence.

        Args:
          rng: passed to the cell's own `initialize_carry`. An unbound wrapper draws from it, and
            passes on a key that it derives from it.
          input_shape: the shape of the input at a step, `[*batch, *features]`, or a pytree of
            such shapes for nested inputs.

        Returns:
          The carry to start a sequence with.

        Raises:
          ValueError: in training, if there is no `dropout` stream.
        """
        key = None
        if self._stream() is None and not self.deterministic:
            key, rng = rng, cell_rng(rng)
        cell_carry = self.cell.initialize_carry(rng, input_shape)
        return self._start(self._sequence_rng(cell_carry, key), cell_carry, input_shape)

    @nn.nowrap
    def redraw_masks(
        self,
        carry: PyTree,
        inputs: PyTree,
        rng: jax.Array | None = None,
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
          rng: the key of the new sequence. None reads the `dropout` stream.
          deterministic: if True, this is evaluation. None uses the module's own setting.

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
        initializing = self.is_initializing()
        return self._step(carry, inputs, deterministic, initializing=initializing)


class DropoutCell(Wrapper):
    """A Flax cell under recurrent dropout; use it in place of the cell.

    In training it reads the `dropout` stream, once per sequence; `init` and evaluation need none.
    The cell's weights keep their names in `nn.RNN`.

    Its carry is a `DropoutCarry`. A carry that is passed to the next window keeps its masks, as if
    one long sequence had been cut; `redraw_masks` starts new masks.

    Args:
      cell: any `nn.RNNCellBase`.
      dropout: the noise at each site. One noise for the whole `state` of an LSTM-family cell
        means h alone; for c as well, write `state=(noise_c, noise_h)`. If another cell's state has
        several leaves, give a structure.
      deterministic: if True, this is evaluation.

    Raises:
      TypeError: if `cell` is not a cell, or `dropout` is not a `RecurrentDropout`.

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
        LINEN.check_cell(self.cell)
        check_dropout(self.dropout)
        super().__post_init__()

    @nn.nowrap
    def _spec_for(self, cell_carry: PyTree) -> RecurrentDropout:
        return self._resolve_noise(self.dropout, cell_carry)
