"""What linen's and NNX's layers share: where time is, what came with it, and the scan itself."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from .._describe import Description, describe
from .._leaky import Family, place_state
from .._scan import check_seq_lengths, dropout_scan
from .._shown import shown
from .._sites import PyTree, RecurrentDropout
from .carry import DropoutCarry
from .first_carry import naming_carry


class Layout(NamedTuple):
    """How a layer reads its inputs.

    Attributes:
      xs: the inputs, time first.
      batch: the batch dims.
      time_axis: where time is in the inputs.
      step_shape: the shape of the inputs at a step, `[*batch, *features]`.
    """

    xs: jax.Array
    batch: tuple[int, ...]
    time_axis: int
    step_shape: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the inputs as they came."""
        shape = list(self.step_shape)
        shape.insert(self.time_axis, self.xs.shape[0])
        return tuple(shape)


_OF_LAYERS = tuple("time_major return_carry reverse keep_order unroll checkpoint_every".split())


@dataclasses.dataclass(frozen=True)
class Call:
    """What a layer's call was given beside its inputs, with the layer's own where it was not."""

    time_major: bool
    return_carry: bool
    reverse: bool
    keep_order: bool
    unroll: int
    checkpoint_every: int | None
    start: Any
    seq_lengths: Any
    resets: Any
    sequence_ids: Any

    @classmethod
    def of(cls, layer: Any, **given: Any) -> "Call":
        """What the call was given, or the layer has where that is None."""
        own = {name: choose(given.pop(name, None), getattr(layer, name)) for name in _OF_LAYERS}
        return cls(**own, **given)


def choose(given: Any, own: Any) -> Any:
    """What was given at the call wins over what the layer has."""
    return own if given is None else given


def check_layer_dropout(dropout: Any) -> None:
    """Refuses what is no `RecurrentDropout`."""
    if not isinstance(dropout, RecurrentDropout):
        raise TypeError(
            f"RNN needs a RecurrentDropout beside its cell, such as "
            f"RNN(cell, RecurrentDropout(input=Dropout(keep_prob=0.8))), got {shown(dropout)}."
        )


def refuse_wrapper(cell: Any, part: Any) -> None:
    """Refuses a cell that is, or holds, a wrapper with dropout of its own."""
    holds = "" if part is cell else f"{type(cell).__name__} holds "
    raise TypeError(
        f"RNN does the work of {type(part).__name__}, so its cell must be bare; got {holds}"
        f"a {type(part).__name__}. Write RNN(cell, dropout) around the bare cell, or put the "
        f"{type(part).__name__} into the stock RNN of Flax."
    )


def refuse_as_cell() -> TypeError:
    """What a host gets that takes the layer for a cell."""
    return TypeError(
        "RNN of flax_dropout_cell is a layer that runs over whole sequences, and no cell: call it "
        "on the inputs as it is, or put DropoutCell(cell, dropout) into the stock RNN of Flax."
    )


def refuse_state(cell: Any, what: str) -> TypeError:
    """What a cell gets that a pure function of its weights cannot stand for."""
    return TypeError(
        f"{type(cell).__name__} {what} at each step; RNN runs its cell as a pure function of its "
        f"weights. Use the stock RNN of Flax, which has arguments for that, around "
        f"DropoutCell(cell, dropout)."
    )


def read_layout(inputs: Any, num_feature_axes: int, time_major: bool) -> Layout:
    """Finds time and batch in the inputs."""
    inputs = jnp.asarray(inputs)
    if inputs.ndim < num_feature_axes + 1:
        dims = ["time", "*batch"] if time_major else ["*batch", "time"]
        features = "features" if num_feature_axes == 1 else f"{num_feature_axes} feature axes"
        raise ValueError(
            f"the inputs must be [{', '.join([*dims, features])}], got shape {inputs.shape}."
        )
    time_axis = 0 if time_major else inputs.ndim - num_feature_axes - 1
    xs = jnp.moveaxis(inputs, time_axis, 0)
    batch = xs.shape[1 : xs.ndim - num_feature_axes]
    return Layout(xs, batch, time_axis, xs.shape[1:])


def run_layer(
    params: PyTree,
    carry: PyTree,
    layout: Layout,
    rng: jax.Array | None,
    *,
    cell: Callable[..., Any],
    dropout: RecurrentDropout,
    family: Family,
    make_carry: Callable[[], PyTree],
    call: Call,
) -> Any:
    """Runs `dropout_scan` over inputs that are laid out as Flax's layers have it.

    Args:
      params: the cell's weights.
      carry: the first carry.
      layout: the inputs.
      rng: the call's key; None is evaluation.
      cell: the cell as a pure function of its weights.
      dropout: which noise sits where.
      family: what is known of the cell.
      make_carry: makes the carry of a new sequence, for resets.
      call: what else the call was given.

    Returns:
      The outputs, or `(carry, outputs)`, as the stock layer has it.
    """
    carry = _check_carry(carry, layout, call)
    lengths = _check_lengths(call, layout)
    resets = _time_first("resets", call.resets, layout, call, timed=True)
    ids = _time_first("sequence_ids", call.sequence_ids, layout, call, timed=resets is not None)
    options: dict[str, Any] = {}
    if call.checkpoint_every is not None:
        options["checkpoint_every"] = call.checkpoint_every
    with naming_carry(carry, make_carry, layout.shape):
        carry, ys = dropout_scan(
            params,
            carry,
            layout.xs,
            rng,
            cell=cell,
            dropout=place_state(dropout, carry, family),
            seq_lengths=lengths,
            resets=resets,
            reset_carry=None if resets is None else make_carry(),
            sequence_ids=ids,
            reverse=call.reverse,
            start=call.start,
            unroll=call.unroll,
            **options,
        )
    if call.reverse and not call.keep_order:
        ys = jax.tree.map(lambda y: _flip(y, lengths), ys)
    ys = jax.tree.map(lambda y: jnp.moveaxis(y, 0, layout.time_axis), ys)
    return (carry, ys) if call.return_carry else ys


def _flip(y: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """Turns outputs `[time, *batch, ...]` round; padding stays at the end."""
    if lengths is None:
        return jnp.flip(y, 0)
    steps = jnp.arange(y.shape[0]).reshape((-1,) + (1,) * lengths.ndim)
    at = (lengths[None] - 1 - steps) % y.shape[0]
    return jnp.take_along_axis(y, at.reshape(at.shape + (1,) * (y.ndim - at.ndim)), 0)


def describe_layer(
    params: PyTree,
    carry: PyTree,
    layout: Layout,
    *,
    cell: Callable[..., Any],
    dropout: RecurrentDropout,
    family: Family,
) -> Description:
    """`fdc.describe` for a layer's cell, as `run_layer` runs it."""
    x = jax.ShapeDtypeStruct(layout.step_shape, layout.xs.dtype)
    placed = place_state(dropout, carry, family)
    return describe(params, carry, x, cell=cell, dropout=placed)


def _check_carry(carry: PyTree, layout: Layout, call: Call) -> PyTree:
    if isinstance(carry, DropoutCarry):
        raise TypeError(
            "initial_carry is a DropoutCarry, but the carry of RNN is the cell's own, as the call "
            "draws its own masks: give initial_carry=carry.cell_carry."
        )
    swapped = _swapped(layout, call)
    for path, leaf in tree_leaves_with_path(carry):
        dims = np.shape(leaf)[: len(layout.batch)]
        if dims != layout.batch and dims == swapped:
            raise ValueError(
                f"initial_carry{keystr(path)} has shape {np.shape(leaf)}, but the batch is "
                f"{layout.batch}.{_reading(layout, call)}"
            )
    return carry


def _check_lengths(call: Call, layout: Layout) -> jax.Array | None:
    if call.seq_lengths is None:
        return None
    lengths = check_seq_lengths(call.seq_lengths)
    if lengths.shape != layout.batch:
        hint = _reading(layout, call) if lengths.shape == _swapped(layout, call) else ""
        raise ValueError(
            f"seq_lengths must have the batch dims of the inputs, {layout.batch}, got shape "
            f"{lengths.shape}.{hint}"
        )
    return lengths


def _time_first(
    name: str, value: Any, layout: Layout, call: Call, *, timed: bool
) -> jax.Array | None:
    """Checks `resets` or `sequence_ids`, and puts time first, as the core has it."""
    if value is None:
        return None
    value = jnp.asarray(value)
    wanted = jnp.bool_ if name == "resets" else jnp.integer
    if not jnp.issubdtype(value.dtype, wanted):
        kind = "bools" if name == "resets" else "ints"
        raise TypeError(f"{name} must be {kind}, got {value.dtype}.")
    expected, dims = list(layout.batch), "*batch"
    if timed:
        expected.insert(layout.time_axis, layout.xs.shape[0])
        dims = "time, *batch" if call.time_major else "*batch, time"
    if value.shape != tuple(expected):
        beside = f" {'beside' if timed else 'without'} resets" if name != "resets" else ""
        swapped = tuple(expected[::-1]) if timed else _swapped(layout, call)
        hint = _reading(layout, call) if value.shape == swapped else ""
        raise ValueError(
            f"{name}{beside} must be [{dims}], as the inputs have it: {tuple(expected)}, got "
            f"shape {value.shape}.{hint}"
        )
    return jnp.moveaxis(value, layout.time_axis, 0) if timed else value


def _swapped(layout: Layout, call: Call) -> tuple[int, ...]:
    """The batch dims if time were at the other end of them."""
    steps = layout.xs.shape[0]
    if call.time_major:
        return (steps, *layout.batch[:-1])
    return (*layout.batch[1:], steps)


def _reading(layout: Layout, call: Call) -> str:
    """Says which axis was read as time, where what came fits another reading."""
    return (
        f" Axis {layout.time_axis} of the inputs {layout.shape} was read as time; where it is at "
        f"the other end of the batch dims, pass time_major={not call.time_major}."
    )
