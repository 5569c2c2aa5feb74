"""Shared by linen's and NNX's layers: the layout of inputs, the settings, and the scan."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._arguments import as_ints, check_flag
from .._messages import short_tree_repr
from .._sequence.dropout_scan import at_a_step, dropout_scan
from .._sequence.padding import check_lengths
from .._sharding import place_rows
from .._spec.recurrent_dropout import PyTree, RecurrentDropout, draws_at_each_step
from .carry import DropoutCarry
from .initial_carry import blame_initial_carry


class Layout(NamedTuple):
    """The layout of a layer's inputs.

    Attributes:
      xs: the inputs, a pytree of arrays, time first.
      batch: the batch dims.
      time_axis: the axis of time in the caller's inputs.
    """

    xs: PyTree
    batch: tuple[int, ...]
    time_axis: int

    @property
    def steps(self) -> int:
        """The number of steps."""
        return jax.tree.leaves(self.xs)[0].shape[0]

    @property
    def leading_shape(self) -> tuple[int, ...]:
        """The sizes of the batch and time axes, in the order of the inputs."""
        return (*self.batch[: self.time_axis], self.steps, *self.batch[self.time_axis :])

    @property
    def shape(self) -> PyTree:
        """The shape of the inputs as they came, for each array of them."""
        leading = self.leading_shape
        return jax.tree.map(lambda x: (*leading, *x.shape[len(leading) :]), self.xs)

    def place(self, carry: PyTree) -> PyTree:
        """A cell's initial carry, whose rows are sharded as the inputs' are on explicit axes."""
        return place_rows(carry, self.batch, at_a_step(jax.tree.leaves(self.xs)[0]))

    @property
    def step_shape(self) -> PyTree:
        """The shape of the inputs at a step, `[*batch, *features]`, for each array of them."""
        return jax.tree.map(lambda x: x.shape[1:], self.xs)

    @property
    def first(self) -> PyTree:
        """The inputs of the first step; zeros if there is none."""
        return jax.tree.map(
            lambda x: x[0] if self.steps else jnp.zeros(x.shape[1:], x.dtype), self.xs
        )


class Settings(NamedTuple):
    """A layer's settings, with those of the call in their place.

    To add one, make it a field here and of both layers, and use it in `run_layer`. If the loop
    needs it, pass it through `_hoist/checkpointed_scan.py` and `_hoist/hoisted_scan.py` too.
    """

    time_major: bool
    return_carry: bool
    reverse: bool
    keep_order: bool
    unroll: int
    checkpoint_every: int | None
    parallel: bool | None

    @classmethod
    def of(cls, layer: Any, **call: Any) -> "Settings":
        """The layer's own, with those that a call gives."""
        own = {name: getattr(layer, name) for name in cls._fields}
        chosen = own | {name: value for name, value in call.items() if value is not None}
        for name in ("time_major", "return_carry", "reverse", "keep_order"):
            chosen[name] = check_flag(name, chosen[name])
        return cls(**chosen)


def check_one_step(layer: Any, start: Any, layout: Layout, carry: PyTree, rng: Any) -> None:
    """Raises if a loop of calls of one step each would have the same per-step masks at all steps.

    Such a loop passes the carry on and gives each call the sequence's key: only `start` then says
    which step it is.
    """
    loops = layout.steps == 1 and carry is not None and isinstance(rng, jax.Array)
    if loops and start is None and draws_at_each_step(layer.dropout):
        raise ValueError(
            "this call has one step, an initial_carry and a key, but no start=. In a loop with one "
            "key, each step would draw the same per-step masks: pass start=t, the index of the "
            "step. If each call has a key of its own, pass start=0."
        )


def check_cell_carries(**carries: PyTree) -> None:
    """Raises if a carry is a wrapper's: a layer has no place for its masks."""
    for name, carry in carries.items():
        if isinstance(carry, DropoutCarry):
            raise TypeError(f"{name} is a DropoutCarry: give {name}=carry.cell_carry.")


def impure_cell_error(cell: Any, what: str) -> TypeError:
    """The error for a cell that is not a pure function of its weights."""
    return TypeError(
        f"{type(cell).__name__} {what} at each step; RNN runs its cell as a pure function of its "
        f"weights. Put DropoutCell(cell, dropout) into Flax's own RNN instead, which can carry "
        f"variables and split streams."
    )


def read_layout(inputs: Any, num_feature_axes: int, time_major: bool) -> Layout:
    """Finds time and batch in the inputs.

    Of several arrays the one with most axes has the cell's feature axes. The others, such as a
    time that goes with each x, start with the same axes of batch and time.
    """
    inputs = jax.tree.map(jnp.asarray, inputs)
    arrays = jax.tree.leaves(inputs)
    ndim = max((array.ndim for array in arrays), default=0) - num_feature_axes
    if ndim < 1:
        dims = ["time", "*batch"] if time_major else ["*batch", "time"]
        features = "features" if num_feature_axes == 1 else f"{num_feature_axes} feature axes"
        got = f"shape {arrays[0].shape}" if len(arrays) == 1 else short_tree_repr(inputs)
        raise ValueError(f"the inputs must be [{', '.join([*dims, features])}], got {got}.")
    if len({array.shape[:ndim] for array in arrays}) > 1:
        wanted = f"start with the same {ndim} axes, batch and time"
        raise ValueError(f"the inputs must {wanted}, got {short_tree_repr(inputs)}.")
    time_axis = 0 if time_major else ndim - 1
    batch = list(arrays[0].shape[:ndim])
    del batch[time_axis]
    xs = jax.tree.map(lambda array: jnp.moveaxis(array, time_axis, 0), inputs)
    return Layout(xs, tuple(batch), time_axis)


def run_layer(
    params: PyTree,
    carry: PyTree,
    layout: Layout,
    rng: jax.Array | None,
    *,
    cell: Callable[..., Any],
    dropout: RecurrentDropout,
    make_carry: Callable[[], PyTree],
    settings: Settings,
    start: Any = None,
    seq_lengths: Any = None,
    valid: Any = None,
    resets: Any = None,
    reset_carry: PyTree = None,
    sequence_ids: Any = None,
    collect: Callable[[PyTree], None] | None = None,
) -> Any:
    """Runs `dropout_scan` over inputs that are in the layout of Flax's layers.

    Args:
      params: the cell's weights.
      carry: the initial carry.
      layout: the inputs.
      rng: the call's key; None is evaluation.
      cell: the cell as a pure function of its weights.
      dropout: the noise at each site.
      make_carry: makes the carry of a new sequence, for resets.
      settings: the layer's settings, with those of the call.
      start: as in the layers; so are the next five.
      seq_lengths: the steps of each row.
      valid: False at padding.
      resets: True at a sequence's first step.
      reset_carry: the carry there.
      sequence_ids: the ids of the rows.
      collect: if given, the cell's output is `(y, others)`, and this takes the others of all
        steps, time first, in the order of the inputs.

    Returns:
      The outputs, or `(carry, outputs)`, like Flax's layer.
    """
    lengths = _check_lengths(seq_lengths, layout)
    valid = _bools_time_first("valid", valid, layout, settings)
    resets = _bools_time_first("resets", resets, layout, settings)
    ids = _ids_time_first(sequence_ids, layout, settings, timed=resets is not None)
    if reset_carry is None and resets is not None:
        reset_carry = make_carry()
    # With `collect` the cell returns (y, sown), and the noise at `output` is for y alone.
    if collect is not None and dropout.output is not None:
        dropout = dataclasses.replace(dropout, output=(dropout.output, None))
    # `make_carry` may draw or write, so it is called only after a failure.
    with blame_initial_carry(carry, make_carry, layout.shape):
        carry, ys = dropout_scan(
            params,
            carry,
            layout.xs,
            rng,
            cell=cell,
            dropout=dropout,
            seq_lengths=lengths,
            valid=valid,
            resets=resets,
            reset_carry=reset_carry,
            sequence_ids=ids,
            start=0 if start is None else start,
            reverse=settings.reverse,
            unroll=settings.unroll,
            checkpoint_every=settings.checkpoint_every,
            parallel=settings.parallel,
        )
    if collect is not None:
        ys, others = ys
        collect(others)
    if settings.reverse and not settings.keep_order:
        ys = jax.tree.map(lambda y: _flip(y, lengths), ys)
    ys = jax.tree.map(lambda y: jnp.moveaxis(y, 0, layout.time_axis), ys)
    return (carry, ys) if settings.return_carry else ys


def _flip(y: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """Turns outputs `[time, *batch, ...]` round; padding stays at the end."""
    if lengths is None or y.ndim <= lengths.ndim:  # an output that rows share has no padding
        return jnp.flip(y, 0)
    steps = jnp.arange(y.shape[0], dtype=lengths.dtype).reshape((-1,) + (1,) * lengths.ndim)
    # Each row's own steps are turned. The rest, modulo the length, are steps of its padding.
    at = (lengths[None] - 1 - steps) % y.shape[0]
    return jnp.take_along_axis(y, at.reshape(at.shape + (1,) * (y.ndim - at.ndim)), 0)


def _check_lengths(seq_lengths: Any, layout: Layout) -> jax.Array | None:
    if seq_lengths is None:
        return None
    lengths = check_lengths(seq_lengths, layout.steps)
    if lengths.shape != layout.batch:
        wanted = f"the batch dims of the inputs, {layout.batch}"
        raise ValueError(f"seq_lengths must have {wanted}, got shape {lengths.shape}.")
    return lengths


def _bools_time_first(name: str, bools: Any, layout: Layout, settings: Settings) -> Any:
    """Checks bools with the inputs' axes of batch and time, and moves time to the front."""
    if bools is None:
        return None
    bools = jnp.asarray(bools)
    if bools.dtype != bool:
        raise TypeError(f"{name} must be bools, got {bools.dtype}.")
    _check_shape(name, bools, layout, settings, timed=True)
    return _move_time_first(bools, layout)


def _ids_time_first(ids: Any, layout: Layout, settings: Settings, *, timed: bool) -> Any:
    """Checks the ids of rows, or of rows at each step if `timed`, and moves time to the front."""
    if ids is None:
        return None
    ids = as_ints("sequence_ids", ids)
    case = "with" if timed else "without"
    _check_shape(f"sequence_ids {case} resets", ids, layout, settings, timed=timed)
    return _move_time_first(ids, layout) if timed else ids


def _check_shape(name: str, value: Any, layout: Layout, settings: Settings, *, timed: bool) -> None:
    expected = layout.leading_shape if timed else layout.batch
    if value.shape != expected:
        dims = "*batch"
        if timed:
            dims = "time, *batch" if settings.time_major else "*batch, time"
        wanted = f"[{dims}], like the inputs, {expected}"
        raise ValueError(f"{name} must be {wanted}, got shape {value.shape}.")


def _move_time_first(value: Any, layout: Layout) -> Any:
    axes = list(range(value.ndim))
    axes.insert(0, axes.pop(layout.time_axis))
    return value.transpose(axes)  # in NumPy if it came so: JAX would truncate its ids to 32 bits
