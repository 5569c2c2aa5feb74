"""`RNN`: a linen cell over whole sequences, under recurrent dropout."""

from typing import Any

import flax.linen as nn
import jax

from .._describe import Description
from .._flax.first_carry import naming_carry
from .._flax.layer import (
    Call,
    check_layer_dropout,
    choose,
    describe_layer,
    read_layout,
    refuse_as_cell,
    refuse_wrapper,
    run_layer,
)
from .._flax.wrapper import CellWrapper
from .._leaky import Family
from .._random.keys import as_rng
from .._sites import PyTree, RecurrentDropout
from .dropout_cell import check_cell
from .functional import parts_of, pure_cell


class RNN(nn.Module):
    """`nn.RNN` under recurrent dropout: any cell over whole sequences.

    In training a call reads the `dropout` stream once, or takes `rng`; from that key variational
    masks are drawn once and per-step masks at each step. `init` and evaluation need no key. A
    call is a window: it draws new masks, on whatever carry it starts from (Gal and Ghahramani
    2016, arXiv:1512.05287, section 4).

    The weights have the names that they have in `nn.RNN(cell)`, so its checkpoints load as they
    are. The carry is the cell's own. Outputs on padding are zero, unlike in `nn.RNN`. It goes into
    `nn.Bidirectional`.

    Args:
      cell: any `nn.RNNCellBase`, bare.
      dropout: which noise sits where. One noise for the whole `state` of an LSTM means h.
      deterministic: True is evaluation. What is given at the call wins, here and below.
      time_major: whether inputs are `[time, *batch, *features]`, not `[*batch, time, *features]`.
      return_carry: whether to return `(carry, outputs)`.
      reverse: whether to run from each sequence's end to its start. Outputs then come in the
        order in which they were made, with padding still at the end.
      keep_order: with `reverse`, outputs come in the order of the inputs.
      unroll: as in `jax.lax.scan`.
      checkpoint_every: as in `dropout_scan`.

    Raises:
      TypeError: `cell` is no cell, or has dropout of its own, or `dropout` is no
        `RecurrentDropout`.

    Example:
      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> noise = fdc.Dropout(keep_prob=0.8, variational=True)
      >>> dropout = fdc.RecurrentDropout(input=noise, inside={"recurrent": noise})
      >>> rnn = fdc.linen.RNN(fdc.linen.LSTMCell(64), dropout)
      >>> x = jnp.ones((4, 20, 32))
      >>> variables = rnn.init(jax.random.key(0), x)
      >>> rnn.apply(variables, x, rngs={"dropout": jax.random.key(1)}).shape
      (4, 20, 64)
      >>> rnn.apply(variables, x, deterministic=True).shape
      (4, 20, 64)
    """

    cell: nn.RNNCellBase
    dropout: RecurrentDropout
    deterministic: bool = False
    time_major: bool = False
    return_carry: bool = False
    reverse: bool = False
    keep_order: bool = False
    unroll: int = 1
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        _check_cell(self.cell)
        check_layer_dropout(self.dropout)
        super().__post_init__()

    @property
    def num_feature_axes(self) -> int:
        """Not for a layer: it is how `nn.RNN` would ask, had it been given one for its cell."""
        raise refuse_as_cell()

    def __call__(
        self,
        inputs: jax.Array,
        *,
        initial_carry: PyTree = None,
        init_key: jax.Array | None = None,
        seq_lengths: jax.typing.ArrayLike | None = None,
        resets: jax.typing.ArrayLike | None = None,
        sequence_ids: jax.typing.ArrayLike | None = None,
        start: int | jax.Array = 0,
        deterministic: bool | None = None,
        rng: jax.Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
    ) -> Any:
        """Runs the cell over the inputs, in training with dropout.

        Args:
          inputs: `[*batch, time, *features]`, or time first with `time_major`.
          initial_carry: the cell's carry to start from; its `initialize_carry` by default.
          init_key: the key for `initialize_carry`; `jax.random.key(0)` by default.
          seq_lengths: ints `[*batch]`. Past its length a row's carry stands still and its outputs
            are zero.
          resets: bools `[*batch, time]`, with time where the inputs have it. True marks a
            sequence's first step: the row's carry is that of `initialize_carry` there, and its
            variational masks are new.
          sequence_ids: ints `[*batch]`, or shaped like `resets` beside them. A row then draws by
            its id instead of by its place; equal ids, equal masks.
          start: the absolute index of the first step. A sequence that is cut into windows, each
            with the same `rng`, its own `start` and the carry of the one before, gives the uncut
            result.
          deterministic: True is evaluation; None is as the layer has it.
          rng: the key to draw from, instead of the `dropout` stream. Layers that are given one key
            have equal masks.
          return_carry: None is as the layer has it; so are the rest.
          time_major: see the layer.
          reverse: see the layer.
          keep_order: see the layer.

        Returns:
          The outputs, `[*batch, time, ...]` or time first; `(carry, outputs)` with
          `return_carry`.

        Raises:
          ValueError: there is no key to draw from and this is neither evaluation nor `init`, or
            a shape does not fit.
          TypeError: `rng` is no key, a dtype does not fit, or the cell draws or writes at each
            step.
        """
        if self.scope is None:
            raise ValueError(
                "RNN was called without its weights: write rnn.apply(variables, inputs, "
                "rngs={'dropout': key}), or call it inside another module."
            )
        call = Call.of(
            self,
            time_major=time_major,
            return_carry=return_carry,
            reverse=reverse,
            keep_order=keep_order,
            start=start,
            seq_lengths=seq_lengths,
            resets=resets,
            sequence_ids=sequence_ids,
        )
        key = self._key(as_rng(rng), choose(deterministic, self.deterministic))
        layout = read_layout(inputs, self.cell.num_feature_axes, call.time_major)

        def make_carry() -> PyTree:
            first = jax.random.key(0) if init_key is None else init_key
            return self.cell.initialize_carry(first, layout.step_shape)

        carry = make_carry() if initial_carry is None else initial_carry
        if self.is_initializing():
            with naming_carry(carry, make_carry, layout.shape):
                self.cell(carry, layout.xs[0])  # makes the weights
        params, cell = pure_cell(self.cell)
        return run_layer(
            params,
            carry,
            layout,
            key,
            cell=cell,
            dropout=self.dropout,
            family=_family(self.cell),
            make_carry=make_carry,
            call=call,
        )

    @nn.nowrap
    def describe(self, inputs: Any, *, time_major: bool | None = None) -> Description:
        """Shows what the layer disturbs, as a table; it needs no weights and no keys.

        Args:
          inputs: inputs, or a `jax.ShapeDtypeStruct` of them.
          time_major: see the layer.

        Returns:
          A `Description`, as `fdc.describe` gives it for one step of the cell.

        Example:
          >>> import flax_dropout_cell as fdc
          >>> import jax, jax.numpy as jnp
          >>> gal = fdc.recipes.gal2016(input_keep_prob=0.8, recurrent_keep_prob=0.7)
          >>> fdc.linen.RNN(fdc.linen.GRUCell(8), gal).describe(jnp.ones((4, 20, 8)))
          site                 value          noise                   drawn  mask        shared over
          input                float32[4, 8]  Dropout(keep_prob=0.8)  once   bool[4, 8]  steps
          inside['recurrent']  float32[4, 8]  Dropout(keep_prob=0.7)  once   bool[4, 8]  steps
          not disturbed: params (10 leaves), state, output
          free sites inside the cell: candidate, hidden, input_per_gate, recurrent_per_gate
        """
        found: list[Description] = []

        def trace(rng: jax.Array, inputs: Any) -> None:
            free = self.clone(parent=None)
            free.init(rng, inputs, choose(time_major, self.time_major), found, method=RNN._describe)

        jax.eval_shape(trace, jax.random.key(0), inputs)
        return found[0]

    def _describe(self, inputs: jax.Array, time_major: bool, found: list[Description]) -> None:
        layout = read_layout(inputs, self.cell.num_feature_axes, time_major)
        carry = self.cell.initialize_carry(jax.random.key(0), layout.step_shape)
        self.cell(carry, layout.xs[0])  # makes the weights
        params, cell = pure_cell(self.cell)
        family = _family(self.cell)
        found.append(
            describe_layer(params, carry, layout, cell=cell, dropout=self.dropout, family=family)
        )

    @nn.nowrap
    def _key(self, rng: jax.Array | None, evaluate: bool) -> jax.Array | None:
        if evaluate:
            return None
        if rng is not None:
            return rng
        if self.has_rng("dropout"):
            return self.make_rng("dropout")
        if self.is_initializing():
            return None
        raise ValueError(
            "RNN needs a 'dropout' stream in training: pass rngs={'dropout': key} to apply or "
            "rng=key at the call, or evaluate with deterministic=True."
        )


def _family(cell: nn.RNNCellBase) -> Family:
    if isinstance(cell, nn.LSTMCell | nn.OptimizedLSTMCell | nn.ConvLSTMCell):
        return "lstm"
    return "gru" if isinstance(cell, nn.GRUCell | nn.MGUCell) else None


def _check_cell(cell: Any) -> None:
    check_cell(cell)
    for part in parts_of(cell):
        if isinstance(part, CellWrapper):
            refuse_wrapper(cell, part)
