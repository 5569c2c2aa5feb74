"""`RNN`: a linen cell over whole sequences, under recurrent dropout."""

from typing import Any

import flax.linen as nn
import jax

from .._flax.compat import HashedFields
from .._flax.deterministic import needs_key
from .._flax.initial_carry import blame_initial_carry
from .._flax.inspected_layer import InspectedLayer
from .._flax.layer import (
    Settings,
    check_cell_carries,
    check_one_step,
    read_layout,
    run_layer,
)
from .._flax.wrapper import check_unwrapped
from .._random.keys import as_key, as_rng
from .._spec.recurrent_dropout import PyTree, RecurrentDropout
from .._step.checks import check_dropout
from .framework import LINEN
from .streams import dropout_key


class RNN(InspectedLayer, nn.Module):
    """`nn.RNN` under recurrent dropout: any cell over whole sequences.

    In training a call reads the `dropout` stream once, or takes `rng`; from that key variational
    masks are drawn once and per-step masks at each step. `init` and evaluation need no key. Every
    call draws new masks, even if `initial_carry` continues an earlier call (Gal and Ghahramani
    2016, arXiv:1512.05287, section 4). To keep the masks, pass the same `rng`, and `start`.

    Parameters have the same names as in `nn.RNN(cell)`, so its checkpoints load unchanged. The
    carry is the cell's own. Outputs at padding are zero, unlike in `nn.RNN`. The layer works in
    `nn.Bidirectional`, which passes on no `deterministic`: to evaluate, make its layers with
    `deterministic=True`.

    Args:
      cell: any `nn.RNNCellBase` that is not a wrapper of this library.
      dropout: the noise at each site. One noise at the `state` of an LSTM is for h alone.
      deterministic: if True, this is evaluation. Arguments at the call take precedence.
      time_major: whether inputs are `[time, *batch, *features]`, not `[*batch, time, *features]`.
      return_carry: whether to return `(carry, outputs)`. The carry has no noise of
        `output`. To classify under that noise, take the last valid step of the outputs.
      reverse: whether to run from each sequence's end to its start. Outputs then
        come last step first, unless `keep_order`; padding by `seq_lengths` stays at the end.
      keep_order: with `reverse`, outputs come in the order of the inputs.
      unroll: as in `jax.lax.scan`.
      checkpoint_every: as in `dropout_scan`.
      parallel: as in `dropout_scan`.

    Raises:
      TypeError: if `cell` is not a cell, or has dropout of its own, or `dropout` is not a
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

    _framework = LINEN
    __fn_or_cls__ = HashedFields()

    cell: nn.RNNCellBase
    dropout: RecurrentDropout
    deterministic: bool = False
    time_major: bool = False
    return_carry: bool = False
    reverse: bool = False
    keep_order: bool = False
    unroll: int = 1
    checkpoint_every: int | None = None
    parallel: bool | None = None

    def __post_init__(self) -> None:
        check_unwrapped(LINEN, self.cell)
        check_dropout(self.dropout)
        super().__post_init__()

    def __call__(
        self,
        inputs: PyTree,
        *,
        initial_carry: PyTree = None,
        init_key: jax.Array | None = None,
        seq_lengths: jax.typing.ArrayLike | None = None,
        valid: jax.typing.ArrayLike | None = None,
        resets: jax.typing.ArrayLike | None = None,
        sequence_ids: jax.typing.ArrayLike | None = None,
        start: int | jax.Array | None = None,
        reset_carry: PyTree = None,
        deterministic: bool | None = None,
        rng: jax.Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
    ) -> Any:
        """Runs the cell over the inputs, in training with dropout.

        Args:
          inputs: `[*batch, time, *features]`, or time first with `time_major`; or a pytree of
            arrays that start with the same axes of batch and time, for a cell that reads one.
          initial_carry: the cell's carry to start from; its `initialize_carry` by default.
          init_key: the key for `initialize_carry`; `jax.random.key(0)` by default.
          seq_lengths: ints `[*batch]`. Past its length a row keeps its carry, and its outputs are
            zero.
          valid: bools `[*batch, time]`, with the inputs' order of axes, instead of `seq_lengths`,
            for padding of any pattern. False marks padding.
          resets: bools `[*batch, time]`, with the inputs' order of axes. True marks a sequence's
            first step: the row's carry becomes `reset_carry`, and its variational masks are new.
            For a learner to have the masks of its actors, both need `sequence_ids`.
          sequence_ids: ints `[*batch]`; with `resets`, of their shape. A row's masks then
            depend on its id, not on its place in the batch. Two sequences with the same id get the
            same masks.
          start: the absolute index of the first step, 0 by default. A sequence that is cut into
            windows, each with the same `rng`, its own `start` and the carry of the one before,
            gives the uncut result. With `resets` this needs `sequence_ids` too. With `reverse` as
            well, see `dropout_scan`.
          reset_carry: the carry at a reset, such as a learned initial state; that of
            `initialize_carry` by default.
          deterministic: if True, this is evaluation. None uses the layer's own setting, here and
            below.
          rng: the key to draw from, instead of the `dropout` stream. Layers that get the same key
            have equal masks.
          return_carry: see the layer.
          time_major: see the layer.
          reverse: see the layer.
          keep_order: see the layer.

        Returns:
          The outputs, `[*batch, time, ...]` or time first; `(carry, outputs)` with
          `return_carry`.

        Raises:
          ValueError: if a shape does not fit or, in training, if there is no key.
          TypeError: if `rng` is not a key, a dtype does not fit, or the cell draws or writes at
            each step.
        """
        if self.scope is None:
            raise ValueError(
                "RNN was called without its weights: write rnn.apply(variables, inputs, "
                "rngs={'dropout': key}), or call it inside another module."
            )
        check_cell_carries(initial_carry=initial_carry, reset_carry=reset_carry)
        settings = Settings.of(
            self,
            time_major=time_major,
            return_carry=return_carry,
            reverse=reverse,
            keep_order=keep_order,
        )
        rng = as_rng(rng)
        draws = needs_key(self.dropout, deterministic, self.deterministic)
        key = dropout_key(self, rng, "RNN") if draws else None
        layout = read_layout(inputs, LINEN.num_feature_axes(self.cell), settings.time_major)

        def make_carry() -> PyTree:
            given = jax.random.key(0) if init_key is None else init_key
            first = as_key("init_key", given)
            return layout.place(self.cell.initialize_carry(first, layout.step_shape))

        carry = make_carry() if initial_carry is None else initial_carry
        if key is not None:
            check_one_step(self, start, layout, initial_carry, rng)
        if self.is_initializing():
            with blame_initial_carry(carry, make_carry, layout.shape):
                self.cell(carry, layout.first)  # makes the weights
        # The weights are an argument of the scan, which then knows their gradients.
        cell = LINEN.pure(self.cell)
        return run_layer(
            cell.params,
            carry,
            layout,
            key,
            cell=cell,
            dropout=LINEN.resolve_noise(self.dropout, self.cell, carry),
            make_carry=make_carry,
            settings=settings,
            start=start,
            seq_lengths=seq_lengths,
            valid=valid,
            resets=resets,
            reset_carry=reset_carry,
            sequence_ids=sequence_ids,
            collect=cell.put_back if cell.collects else None,
        )
