"""`RNN`: an NNX cell over whole sequences, under recurrent dropout."""

from typing import Any

import jax
from flax import nnx

from .._arguments import check_flag
from .._flax.deterministic import needs_key
from .._flax.inspected_layer import InspectedLayer
from .._flax.layer import (
    Settings,
    check_cell_carries,
    check_one_step,
    read_layout,
    run_layer,
)
from .._flax.wrapper import check_unwrapped
from .._spec.recurrent_dropout import PyTree, RecurrentDropout
from .dropout_attribute import DropoutAttribute
from .framework import NNX_FRAMEWORK
from .streams import RngSource, as_source, carry_stream, dropout_key, fork_stream
from .switchable import Switchable


class RNN(InspectedLayer, DropoutAttribute, Switchable, nnx.Module):
    """`nnx.RNN` under recurrent dropout: any cell over whole sequences.

    In training a call draws one key from the module's own `dropout` stream, or takes `rngs`; from
    that key variational masks are drawn once and per-step masks at each step. Evaluation, by
    `eval()`, `nnx.view` or `deterministic=True`, needs no key. Every call draws new masks, even if
    `initial_carry` continues an earlier call (Gal and Ghahramani 2016, arXiv:1512.05287, section
    4). To keep the masks, pass the same key as `rngs`, and `start`.

    Weights have the same paths as in `nnx.RNN(cell)`: load them with
    `nnx.update(model, nnx.state(old, nnx.Param))`. The filter is needed because `nnx.RNN` has a
    random stream among its state. The carry is the cell's own. Outputs at padding are zero, unlike
    in `nnx.RNN`. The layer works in `nnx.Bidirectional`.

    Args:
      cell: any `nnx.RNNCellBase` that is not a wrapper of this library.
      dropout: the noise at each site. One noise at the `state` of an LSTM is for h alone. `params`
        takes a prefix of the cell's parameters (`nnx.Param`) as a plain dict. Arrays in `dropout`
        are state of this module: a new `dropout` that differs only in their values does not
        retrace.
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
      rngs: the source of the masks, an `nnx.Rngs` or an `nnx.RngStream`; it is forked.

    Raises:
      TypeError: if `cell` is not a cell, or has dropout of its own, or `dropout` is not a
        `RecurrentDropout`.

    Example:
      >>> from flax import nnx
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> noise = fdc.Dropout(keep_prob=0.8, variational=True)
      >>> dropout = fdc.RecurrentDropout(input=noise, inside={"recurrent": noise})
      >>> rngs = nnx.Rngs(params=0, dropout=1)
      >>> rnn = fdc.nnx.RNN(fdc.nnx.LSTMCell(32, 64, rngs=rngs), dropout, rngs=rngs)
      >>> x = jnp.ones((4, 20, 32))
      >>> rnn(x).shape
      (4, 20, 64)
      >>> predict = lambda key: rnn(x, rngs=nnx.Rngs(dropout=key))
      >>> samples = fdc.mc_samples(predict, jax.random.key(2), 3)
      >>> samples.shape
      (3, 4, 20, 64)
    """

    _framework = NNX_FRAMEWORK

    def __init__(
        self,
        cell: nnx.RNNCellBase,
        dropout: RecurrentDropout,
        deterministic: bool = False,
        *,
        time_major: bool = False,
        return_carry: bool = False,
        reverse: bool = False,
        keep_order: bool = False,
        unroll: int = 1,
        checkpoint_every: int | None = None,
        parallel: bool | None = None,
        rngs: RngSource = None,
    ) -> None:
        check_unwrapped(NNX_FRAMEWORK, cell)
        self.cell = cell
        self.dropout = dropout
        self.deterministic = check_flag("deterministic", deterministic)
        self.time_major = time_major
        self.return_carry = return_carry
        self.reverse = reverse
        self.keep_order = keep_order
        self.unroll = unroll
        self.checkpoint_every = checkpoint_every
        self.parallel = parallel
        # Not `rngs`: there nnx.RNN keeps its stream for carries, with the same key in all layers. A
        # checkpoint of it would give all layers the same masks.
        self.dropout_stream: nnx.RngStream | None = fork_stream(rngs)

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
        rngs: RngSource | jax.Array = None,
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
            windows, each with the same key as `rngs`, its own `start` and the carry of the one
            before, gives the uncut result. With `resets` this needs `sequence_ids` too. With
            `reverse` as well, see `dropout_scan`.
          reset_carry: the carry at a reset, such as a learned initial state; that of
            `initialize_carry` by default.
          deterministic: if True, this is evaluation. None uses the layer's own setting, here and
            below.
          rngs: drawn from instead of the layer's own stream: an `nnx.Rngs`, an `nnx.RngStream` or
            a key. The layer's state then does not change, so transformations may close over the
            layer. In a model, pass `nnx.Rngs(dropout=key)` to all layers: each draws its own key
            from it. Layers that get the same bare key have equal masks.
          return_carry: see the layer.
          time_major: see the layer.
          reverse: see the layer.
          keep_order: see the layer.

        Returns:
          The outputs, `[*batch, time, ...]` or time first; `(carry, outputs)` with
          `return_carry`.

        Raises:
          ValueError: if a shape does not fit or, in training, if there is no stream and no key.
          TypeError: if `rngs` is none of these, a dtype does not fit, or the cell draws or writes
            at each step.
        """
        check_cell_carries(initial_carry=initial_carry, reset_carry=reset_carry)
        settings = Settings.of(
            self,
            time_major=time_major,
            return_carry=return_carry,
            reverse=reverse,
            keep_order=keep_order,
        )
        rngs = as_source(rngs)
        layout = read_layout(inputs, NNX_FRAMEWORK.num_feature_axes(self.cell), settings.time_major)

        def make_carry() -> PyTree:
            carry = self.cell.initialize_carry(layout.step_shape, carry_stream(rngs, init_key))
            return layout.place(carry)

        carry = make_carry() if initial_carry is None else initial_carry
        # A draw advances the stream, so only a call that needs a key may draw.
        own = self.dropout_stream
        draws = needs_key(self.dropout, deterministic, self.deterministic)
        key = dropout_key("RNN", rngs, own) if draws else None
        if key is not None:
            check_one_step(self, start, layout, initial_carry, rngs)
        cell = NNX_FRAMEWORK.pure(self.cell)
        return run_layer(
            cell.params,
            carry,
            layout,
            key,
            cell=cell,
            dropout=NNX_FRAMEWORK.resolve_noise(self.dropout, self.cell, carry),
            make_carry=make_carry,
            settings=settings,
            start=start,
            seq_lengths=seq_lengths,
            valid=valid,
            resets=resets,
            reset_carry=reset_carry,
            sequence_ids=sequence_ids,
        )
