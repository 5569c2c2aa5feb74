"""`RNN`: an NNX cell over whole sequences, under recurrent dropout."""

from typing import Any

import jax
from flax import errors, nnx

from .._describe import Description
from .._flax.layer import (
    Call,
    check_layer_dropout,
    choose,
    describe_layer,
    read_layout,
    refuse_as_cell,
    refuse_state,
    refuse_wrapper,
    run_layer,
)
from .._flax.wrapper import CellWrapper
from .._leaky import Family
from .._random.keys import as_rng
from .._sites import PyTree, RecurrentDropout
from .dropout_attribute import DropoutAttribute
from .dropout_cell import check_cell
from .streams import RngSource, carry_stream, fork_stream, has_dropout, is_for_carries


class RNN(DropoutAttribute, nnx.Module):
    """`nnx.RNN` under recurrent dropout: any cell over whole sequences.

    In training a call draws one key from the module's own `dropout` stream, or takes `rngs`; from
    that key variational masks are drawn once and per-step masks at each step. Evaluation, by
    `eval()`, `nnx.view` or `deterministic=True`, needs none. A call is a window: it draws new
    masks, on whatever carry it starts from (Gal and Ghahramani 2016, arXiv:1512.05287, section 4).

    The weights lie where they lie in `nnx.RNN(cell)`, so its checkpoints load as they are. The
    carry is the cell's own. Outputs on padding are zero, unlike in `nnx.RNN`. It goes into
    `nnx.Bidirectional`.

    Args:
      cell: any `nnx.RNNCellBase`, bare.
      dropout: which noise sits where. One noise for the whole `state` of an LSTM means h. `params`
        takes a prefix of the cell's `nnx.Param`s as a plain dict. Arrays in it are data of this
        module, so that a new `dropout` with other values does not retrace.
      deterministic: True is evaluation. What is given at the call wins, here and below.
      time_major: whether inputs are `[time, *batch, *features]`, not `[*batch, time, *features]`.
      return_carry: whether to return `(carry, outputs)`.
      reverse: whether to run from each sequence's end to its start. Outputs then come in the
        order in which they were made, with padding still at the end.
      keep_order: with `reverse`, outputs come in the order of the inputs.
      unroll: as in `jax.lax.scan`.
      checkpoint_every: as in `dropout_scan`.
      rngs: where the masks come from, an `nnx.Rngs` or an `nnx.RngStream`; it is forked.

    Raises:
      TypeError: `cell` is no cell, or has dropout of its own, or `dropout` is no
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
      >>> samples = fdc.mc_samples(lambda key: rnn(x, rngs=key), jax.random.key(2), 3)
      >>> samples.shape
      (3, 4, 20, 64)
    """

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
        rngs: RngSource = None,
    ) -> None:
        _check_cell(cell)
        self.cell = cell
        self.dropout = dropout
        self.deterministic = deterministic
        self.time_major = time_major
        self.return_carry = return_carry
        self.reverse = reverse
        self.keep_order = keep_order
        self.unroll = unroll
        self.checkpoint_every = checkpoint_every
        self.rngs: nnx.RngStream | None = fork_stream(rngs)

    def _check_dropout(self, dropout: Any) -> None:
        check_layer_dropout(dropout)

    @property
    def num_feature_axes(self) -> int:
        """Not for a layer: it is how `nnx.RNN` would ask, had it been given one for its cell."""
        raise refuse_as_cell()

    def set_view(self, deterministic: bool | None = None) -> None:
        """Switches between training and evaluation; `nnx.view` calls it.

        Args:
          deterministic: True is evaluation.
        """
        if deterministic is not None:
            self.deterministic = deterministic

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
        rngs: RngSource | jax.Array = None,
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
            with the same key as `rngs`, its own `start` and the carry of the one before, gives the
            uncut result.
          deterministic: True is evaluation; None is as the layer has it.
          rngs: what to draw from instead of the layer's own stream: an `nnx.Rngs`, an
            `nnx.RngStream` or a key. With a key the call changes no state, so transformations may
            close over the layer. Layers that are given one key have equal masks; from one
            `nnx.Rngs(key)` each draws its own.
          return_carry: None is as the layer has it; so are the rest.
          time_major: see the layer.
          reverse: see the layer.
          keep_order: see the layer.

        Returns:
          The outputs, `[*batch, time, ...]` or time first; `(carry, outputs)` with
          `return_carry`.

        Raises:
          ValueError: there is nothing to draw from and this is not evaluation, or a shape does
            not fit.
          TypeError: `rngs` is none of these, a dtype does not fit, or the cell draws or writes at
            each step.
        """
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
        if not isinstance(rngs, nnx.Rngs | nnx.RngStream):
            rngs = as_rng(rngs)
        layout = read_layout(inputs, self.cell.num_feature_axes, call.time_major)

        def make_carry() -> PyTree:
            return self.cell.initialize_carry(layout.step_shape, carry_stream(rngs, init_key))

        carry = make_carry() if initial_carry is None else initial_carry
        key = self._key(rngs, choose(deterministic, self.deterministic))
        params, cell = _pure(self.cell)
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

    def describe(self, inputs: Any, *, time_major: bool | None = None) -> Description:
        """Shows what the layer disturbs, as a table; it draws nothing.

        Args:
          inputs: inputs, or a `jax.ShapeDtypeStruct` of them.
          time_major: see the layer.

        Returns:
          A `Description`, as `fdc.describe` gives it for one step of the cell.

        Example:
          >>> from flax import nnx
          >>> import flax_dropout_cell as fdc
          >>> import jax.numpy as jnp
          >>> dropout = fdc.RecurrentDropout(output=fdc.Dropout(keep_prob=0.8))
          >>> rnn = fdc.nnx.RNN(nnx.GRUCell(32, 64, rngs=nnx.Rngs(0)), dropout)
          >>> rnn.describe(jnp.ones((4, 20, 32)))
          site    value           noise                   drawn      mask         shared over
          output  float32[4, 64]  Dropout(keep_prob=0.8)  each step  bool[4, 64]
          not disturbed: params (3 leaves), input, state
          free sites inside the cell: none
        """
        found: list[Description] = []
        params, cell = _pure(self.cell)

        def trace(params: PyTree, inputs: Any) -> None:
            time_is_first = choose(time_major, self.time_major)
            layout = read_layout(inputs, self.cell.num_feature_axes, time_is_first)
            carry = self.cell.initialize_carry(layout.step_shape, carry_stream(None, None))
            options = {"cell": cell, "dropout": self.dropout, "family": _family(self.cell)}
            found.append(describe_layer(params, carry, layout, **options))

        jax.eval_shape(trace, params, inputs)
        return found[0]

    def _key(self, rngs: RngSource | jax.Array, evaluate: bool) -> jax.Array | None:
        if evaluate:
            return None
        source = self.rngs if rngs is None or is_for_carries(rngs) else rngs
        if isinstance(source, nnx.Rngs) and has_dropout(source):
            source = source["dropout"]
        if isinstance(source, nnx.RngStream):
            return _draw(source)
        if isinstance(source, jax.Array):
            return source
        raise ValueError(
            "RNN needs a 'dropout' stream in training: make it with rngs=nnx.Rngs(dropout=0), "
            "pass rngs=key or rngs=nnx.Rngs(dropout=key) at the call, or evaluate with eval() or "
            "deterministic=True."
        )


def _pure(cell: nnx.RNNCellBase) -> tuple[PyTree, Any]:
    """A cell's weights as a plain dict, and the cell as a function of them."""
    graphdef, own, rest = nnx.split(cell, nnx.Param, ...)
    structure, before = jax.tree.structure(own), jax.tree.leaves(rest)

    def run(params: PyTree, carry: PyTree, x: PyTree, **options: Any) -> tuple[PyTree, PyTree]:
        weights = jax.tree.unflatten(structure, jax.tree.leaves(params))
        copy = nnx.merge(graphdef, weights, rest)
        result: Any = copy(carry, x, **options)
        after = jax.tree.leaves(nnx.state(copy, nnx.Not(nnx.Param)))
        if list(map(id, after)) != list(map(id, before)):
            raise refuse_state(cell, "writes a variable, or draws from an rng stream,")
        return result

    return nnx.to_pure_dict(own), run


def _draw(stream: nnx.RngStream) -> jax.Array:
    try:
        return stream()
    except errors.TraceContextError:
        raise ValueError(
            "RNN draws its key from a stream that it keeps, which counts its draws, and a "
            "transformation that does not know NNX closes over the layer. Use nnx.jit, nnx.grad "
            "and so on, with the layer as an argument, or pass rngs=key at the call."
        ) from None


def _family(cell: nnx.RNNCellBase) -> Family:
    if isinstance(cell, nnx.LSTMCell | nnx.OptimizedLSTMCell):
        return "lstm"
    return "gru" if isinstance(cell, nnx.GRUCell) else None


def _check_cell(cell: Any) -> None:
    check_cell(cell)
    for _, part in nnx.iter_graph(cell):
        if isinstance(part, CellWrapper):
            refuse_wrapper(cell, part)
