"""A whole sequence under dropout: `jax.lax.scan` with the masks drawn where they belong."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from . import _checkpointed_scan
from ._disturb import Disturbance
from ._inside import Cell
from ._leaky import family_of, place_state
from ._random.keys import as_rng
from ._rows import Rows
from ._sequence_step import At, Running, SequenceStep, check_batch_dims, disturb_once
from ._sequences import RowMasks, Sequences, check_reset_carry, plan_sequences
from ._shown import shown
from ._sites import (
    Masks,
    PyTree,
    RecurrentDropout,
    Site,
    draws_once,
    dtype_of,
    make_masks,
    pair_up,
    sites_of,
)
from ._step import as_rows, check_dropout, check_masks, check_step, draw_sites, site_values


def dropout_scan(
    params: PyTree,
    carry: PyTree,
    xs: PyTree,
    rng: jax.Array | None,
    *,
    cell: Cell,
    dropout: RecurrentDropout,
    masks: Masks | None = None,
    seq_lengths: jax.typing.ArrayLike | None = None,
    resets: jax.typing.ArrayLike | None = None,
    reset_carry: PyTree = None,
    sequence_ids: jax.typing.ArrayLike | None = None,
    reverse: bool = False,
    start: int | jax.Array = 0,
    unroll: int | bool = 1,
    checkpoint_every: int | None = None,
) -> tuple[PyTree, PyTree]:
    """Runs `cell` over a sequence under dropout.

    Variational masks are drawn once, outside the scan; per-step masks inside it, from a key of
    each step's own, where steps count along `xs` from `start`. The same as a Python loop, bit for
    bit::

        masks = draw_masks(params, carry, xs[0], rng, cell=cell, dropout=dropout)
        for t, x in enumerate(xs):
            carry, y = dropout_cell(
                params, carry, x, rng, step=start + t, cell=cell, dropout=dropout, masks=masks
            )

    Args:
      params: the cell's weights.
      carry: the first incoming carry.
      xs: the inputs, a pytree of arrays `[time, ...]`.
      rng: the sequence's key. None with `masks=None` is evaluation; None with masks applies
        these and draws nothing.
      cell: `cell(params, carry, x) -> (carry, y)`.
      dropout: which noise sits where.
      masks: masks to use instead of drawing; the variational ones they lack are drawn.
      seq_lengths: ints `[*batch]`. Past its length a row's carry no longer changes, its `ys` are
        zero, and its `xs` have no effect. Every leaf of the carry and of `ys`
        then starts with the batch dims.
      resets: bools `[time, *batch]`, in the order of `xs`. True marks a sequence's first step:
        there the row's carry is `reset_carry`, and its variational masks are new. With `reverse`
        each sequence starts at its own last step, with the same masks. Masks that rows share, of
        weights or through `broadcast_dims`, belong to the whole call.
      reset_carry: the carry at a reset, of the carry's structure; zeros by default.
      sequence_ids: ints `[*batch]`, or `[time, *batch]` beside `resets`. A row then draws by its
        id instead of by its place, so its masks do not depend on the batch that it is in, or on
        what ran before. Equal ids, equal masks. An id that changes without a reset changes the
        masks, not the carry. Without ids a reset at step s names the sequence: (s, place).
      reverse: run from the last step to the first; `ys` keep the order of `xs`.
      start: the absolute index of `xs[0]`, at least 0. A sequence that is cut in pieces, each
        run with the same `rng` and its own `start`, gives the uncut result.
      unroll: as in `jax.lax.scan`.
      checkpoint_every: for long sequences, keep only every so many steps for the gradient, and
        compute those between a second time, with the same masks. Memory grows with
        `time / checkpoint_every + checkpoint_every` instead of `time`; it need not divide `time`.

    Returns:
      `(carry, ys)`: the last carry, and the outputs `[time, ...]`.

    Raises:
      ValueError: as `dropout_cell`, or a length, shape or `start` does not fit.
      TypeError: as `dropout_cell`, or `seq_lengths` or `start` is not an int.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> def cell(params, h, x):
      ...     h = jnp.tanh(x @ params["in"] + h @ params["rec"])
      ...     return h, h
      >>> params = {"in": jnp.ones((3, 8)), "rec": jnp.ones((8, 8))}
      >>> spec = fdc.RecurrentDropout(state=fdc.Dropout(keep_prob=0.8, variational=True))
      >>> h, ys = fdc.dropout_scan(
      ...     params, jnp.zeros((4, 8)), jnp.ones((20, 4, 3)), jax.random.key(0),
      ...     cell=cell, dropout=spec,
      ... )
      >>> h.shape, ys.shape
      ((4, 8), (20, 4, 8))
    """
    check_dropout(dropout)
    check_masks(masks, dropout)
    rng = as_rng(rng)
    steps = count_steps(xs)
    _check_start(start, steps)
    if seq_lengths is not None:
        seq_lengths = check_seq_lengths(seq_lengths)
        check_batch_dims("carry", carry, seq_lengths.shape, "seq_lengths")
    plan = _plan(carry, steps, resets, reset_carry, sequence_ids, reverse=reverse)
    dropout = place_state(dropout, carry, family_of(cell))
    rows, row_masks = as_rows(plan.ids), None
    if rng is not None:
        values = _values_at_a_step(params, carry, xs, cell, dropout)
        drawn = draw_sites(dropout, values, rng, rows)
        masks = drawn if masks is None else _fill_in(masks, drawn)
        row_masks = plan.row_masks(
            masks, lambda rows: draw_sites(dropout, values, rng, rows, rows_alone=True), start
        )
    elif plan.sequences is not None and masks is not None and _draws_for_rows(dropout):
        raise ValueError("a reset draws new variational masks, so it needs rng; got rng=None.")
    disturbance = Disturbance(dropout, masks, rng, rows)
    weights = disturb_once(disturbance, params)
    running, ys = _checkpointed_scan.scan(
        SequenceStep(
            cell, weights, disturbance, start, seq_lengths, plan.reset_carry, row_masks, plan.by_id
        ),
        plan.begin(carry, row_masks),
        At(jnp.arange(steps, dtype=jnp.uint32), xs, plan.sequences),
        steps=steps,
        reverse=reverse,
        unroll=unroll,
        checkpoint_every=_check_every(checkpoint_every),
    )
    return running.carry, ys


class _Plan(NamedTuple):
    """Which sequences the rows are in.

    Attributes:
      sequences: what happens to each row at each step; None where no row starts anew.
      ids: the ids of the rows as the scan begins; None where rows draw by place.
      reset_carry: the carry of a new sequence.
    """

    sequences: Sequences | None
    ids: Any
    reset_carry: PyTree

    @property
    def by_id(self) -> bool:
        return self.ids is not None

    def row_masks(self, masks: Masks, draw: Callable[[Rows], Masks], start: Any) -> RowMasks | None:
        """How rows get new masks; None where they need none."""
        if self.sequences is None:
            return None
        return RowMasks(masks, draw, self.sequences.names[0], by_id=self.by_id, start=start)

    def begin(self, carry: PyTree, row_masks: RowMasks | None) -> Running:
        """What the first step takes over."""
        if self.sequences is None:
            return Running(carry)
        names = jnp.asarray(self.ids) if self.by_id else jnp.full_like(self.sequences.names[0], -1)
        return Running(carry, None if row_masks is None else row_masks.first, names)


def _plan(
    carry: PyTree, steps: int, resets: Any, reset_carry: PyTree, ids: Any, *, reverse: bool
) -> _Plan:
    if resets is None:
        if reset_carry is not None:
            raise ValueError("reset_carry was given without resets, which say where it goes.")
        return _Plan(None, ids, None)
    sequences = plan_sequences(resets, ids, steps, reverse=reverse)
    check_batch_dims("carry", carry, sequences.begins.shape[1:], "resets")
    first_ids = None if ids is None else sequences.names[-1 if reverse else 0]
    return _Plan(sequences, first_ids, check_reset_carry(reset_carry, carry))


def _values_at_a_step(
    params: PyTree, carry: PyTree, xs: PyTree, cell: Cell, dropout: RecurrentDropout
) -> Masks:
    """The value at each site, or its shapes and dtypes."""
    first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], dtype_of(leaf)), xs)
    return site_values(params, carry, first, cell, dropout)


def _draws_for_rows(dropout: RecurrentDropout) -> bool:
    """Whether rows have variational masks; those of weights are not theirs."""
    return draws_once(dataclasses.replace(dropout, params=None))


def _fill_in(masks: Masks, drawn: Masks) -> Masks:
    """The masks that the caller brings, and the drawn ones where it brings none."""

    def fill_in(site: Site) -> PyTree:
        brought, fresh = site.of(masks), site.of(drawn)
        if brought is None or fresh is None:
            return fresh if brought is None else brought
        pairs = pair_up(f"masks.{site}", brought, fresh)
        return jax.tree.unflatten(
            jax.tree.structure(brought, is_leaf=lambda mask: mask is None),
            [subtree if mask is None else mask for mask, subtree in pairs],
        )

    sites = dict.fromkeys([*sites_of(masks), *sites_of(drawn)])
    return make_masks({site: fill_in(site) for site in sites})


def count_steps(xs: PyTree) -> int:
    """How many steps the inputs have: the length of the axis that leads all of them."""
    shapes = {f"xs{keystr(path)}": np.shape(leaf) for path, leaf in tree_leaves_with_path(xs)}
    if not shapes:
        raise ValueError("xs has no arrays; give the inputs as arrays [time, ...].")
    lengths = {shape[:1] for shape in shapes.values()}
    if len(lengths) > 1 or lengths == {()}:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"the arrays of xs must share their leading axis, time; got {listed}.")
    return lengths.pop()[0]


def check_seq_lengths(seq_lengths: Any) -> jax.Array:
    """The lengths as int32; refuses what is not ints."""
    seq_lengths = jnp.asarray(seq_lengths)
    if not jnp.issubdtype(seq_lengths.dtype, jnp.integer):
        hint = " For a mask, pass its sum over time." if seq_lengths.dtype == bool else ""
        raise TypeError(f"seq_lengths must be ints, got {seq_lengths.dtype}.{hint}")
    return seq_lengths.astype(jnp.int32)


def _check_every(every: Any) -> int | None:
    if every is None:
        return None
    if isinstance(every, bool) or not isinstance(every, int | np.integer) or every < 1:
        raise ValueError(f"checkpoint_every must be an int of at least 1, got {shown(every)}.")
    return int(every)


def _check_start(start: Any, steps: int) -> None:
    check_step("start", start)
    if isinstance(start, int | np.integer) and start + steps > 2**31:
        raise ValueError(f"start + time must be at most 2**31, got {start} + {steps}.")
