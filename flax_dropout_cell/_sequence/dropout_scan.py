"""`dropout_scan`: runs a cell over a whole sequence under dropout."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from .._arguments import check_count, check_flag
from .._hoist.checkpointed_scan import scan_in_chunks
from .._hoist.traced_scan import type_at_a_step
from .._messages import must_be, short_repr, short_tree_repr
from .._random.keys import as_rng
from .._sharding import place_like
from .._spec.prefixes import zip_prefix
from .._spec.recurrent_dropout import (
    Masks,
    PyTree,
    RecurrentDropout,
    SiteValues,
    active_noises,
    fill_in,
    sites_of,
)
from .._step.apply_noise import StepNoise
from .._step.call_cell import Cell
from .._step.checks import as_sequence_ids, as_spec, check_masks, check_start
from .._step.draw_masks import draw_sites, site_values
from .._step.sequence_ids import SequenceIds, ids_from_starts
from .padding import find_valid, stand_ins
from .resets import BEFORE, RowMasks, Sequences, check_reset_carry, plan_sequences
from .scan_step import ScanCarry, SequenceStep, StepInput, disturb_once
from .shared_by_rows import check_rows_apart
from .step_masks import draw_ahead

_LISTED = 4  # more arrays of the inputs than this are not listed in an error


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
    valid: jax.typing.ArrayLike | None = None,
    resets: jax.typing.ArrayLike | None = None,
    reset_carry: PyTree = None,
    sequence_ids: jax.typing.ArrayLike | None = None,
    reverse: bool = False,
    start: int | jax.Array = 0,
    unroll: int | bool = 1,
    checkpoint_every: int | None = None,
    parallel: bool | None = None,
) -> tuple[PyTree, PyTree]:
    """Runs `cell` over a sequence under dropout.

    Variational masks are drawn once, outside the scan. Per-step masks are drawn from a key for
    each step; steps count along `xs` from `start`. The masks are bit for bit those of this loop,
    and the numbers are the same to rounding::

        masks = draw_masks(params, carry, xs[0], rng, cell=cell, dropout=dropout)
        for t, x in enumerate(xs):
            carry, y = dropout_cell(
                params, carry, x, rng, step=start + t, cell=cell, dropout=dropout, masks=masks
            )

    Args:
      params: the cell's weights.
      carry: the first incoming carry.
      xs: the inputs, a pytree of arrays `[time, ...]`.
      rng: the sequence's key. If both `rng` and `masks` are None, this is evaluation. If only
        `rng` is None, the masks are applied and nothing is drawn.
      cell: `cell(params, carry, x) -> (carry, y)`.
      dropout: the noise at each site.
      masks: masks to use instead of drawing them; variational masks that are missing are drawn.
        With `start` and `resets`, give the masks that the rows have at step `start`.
      seq_lengths: ints `[*batch]`. Past its length a row's carry no longer changes, its `ys` are
        zero, and its `xs` have no effect. Every leaf of the carry, of `xs` at a step and of `ys`
        at a step then starts with the batch dims. Leaves with fewer dims than the batch, such as
        a step counter, are shared by all rows and are never held back.
      valid: bools `[time, *batch]`, instead of `seq_lengths`, for padding of any pattern, such as
        in front or between sequences. False marks padding.
      resets: bools `[time, *batch]`, in the order of `xs`. True marks a sequence's first step:
        there the row's carry is `reset_carry`, and its variational masks are new. With `reverse`
        each sequence starts at its own last step, with the same masks. Masks that rows share (of
        weights, or through `broadcast_dims`) stay the same for the whole call. Resets in padding
        are ignored.
      reset_carry: the carry at a reset, of the carry's structure; zeros by default.
      sequence_ids: ints `[*batch]`, or `[time, *batch]` with `resets`. A row's masks then depend on
        its id: not on its place, the batch that it is in, or the steps before. Two sequences with
        the same id get the same masks. An id that changes without a reset changes the masks, not
        the carry. Without ids, a reset at step s names the sequence (s, place). All 64 bits of an
        id count, in NumPy arrays too; arguments of `jax.jit` have 32 bits.
      reverse: run from the last step to the first; `ys` keep the order of `xs`.
      start: the absolute index of `xs[0]`, at least 0. A sequence that is cut in pieces, each
        run with the same `rng` and its own `start`, gives the uncut result. With `resets` this
        needs `sequence_ids` too, because a piece does not know which sequence its rows are in. With
        `reverse` as well, a piece does not know that the next one begins with a reset: put
        `reset_carry` into the carry of those rows before running the piece.
      unroll: as in `jax.lax.scan`.
      checkpoint_every: for long sequences, keep the carry only every so many steps for the
        gradient, and compute the steps between again, with the same masks. Memory grows with
        `time / checkpoint_every + checkpoint_every` instead of `time`. It need not divide `time`.
      parallel: whether to compute all steps at once. This needs a carry that is a linear
        recurrence: updated as `a * carry + b`, element by element, with `a` and `b` independent
        of the carry. Elementwise noise, resets and padding keep it one. If True, any other carry
        is an error. If None, linear recurrences run in parallel except on a CPU, where a loop is
        usually faster. The masks are the same, and the numbers are the same to rounding.

    Returns:
      `(carry, ys)`: the last carry, and the outputs `[time, ...]`.

    Raises:
      ValueError: as in `dropout_cell`; if a shape, `start` or a length in a NumPy array is out of
        range; if options contradict each other, or one is given without another that it needs; or
        if the carry does not permit `parallel=True`. Lengths on a device are clipped.
      TypeError: as in `dropout_cell`, and if an option has the wrong dtype.

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
    dropout = as_spec(dropout, carry, cell)
    check_masks(masks, dropout)
    loop = _Loop.of(reverse, unroll, checkpoint_every, parallel)
    rng = as_rng(rng)
    steps, x = count_steps(xs), at_a_step(xs)
    check_start(start, steps)
    by_row = {"seq_lengths": seq_lengths, "valid": valid, "resets": resets}
    is_valid = find_valid(seq_lengths, valid, steps)
    if sequence_ids is not None and resets is None:
        _check_ids(np.shape(sequence_ids), carry, x)
    plan = _plan(carry, steps, resets, reset_carry, sequence_ids, is_valid, start, loop.reverse)
    option = next((name for name, given in by_row.items() if given is not None), None)
    if option is not None:
        batch = np.shape(resets if is_valid is None else is_valid)[1:]
        check_rows_apart(cell, params, carry, x, batch, option)
    values_of = functools.partial(site_values, params, carry, x, cell)
    ahead = checkpoint_every is None  # masks of all steps are memory that checkpoints save
    drawn = _draw(
        values_of, masks, plan, dropout=dropout, rng=rng, steps=steps, start=start, ahead=ahead
    )
    step_noise = StepNoise(dropout, drawn.masks, rng, plan.user_ids)
    step = SequenceStep(
        cell=cell,
        weights=disturb_once(step_noise, params),
        step_noise=step_noise,
        start=start,
        stand_ins=None if is_valid is None else stand_ins(xs, is_valid),
        reset_carry=plan.reset_carry,
        row_masks=drawn.of_rows,
    )
    offsets = jnp.arange(steps, dtype=jnp.uint32)
    inputs = StepInput(offsets, xs, is_valid, plan.sequences, drawn.of_steps)
    begin = plan.begin(carry, drawn.of_rows)
    running, ys = scan_in_chunks(step, begin, inputs, steps=steps, **loop._asdict())
    return running.carry, ys


class _Loop(NamedTuple):
    """The options of the loop over the steps, as in `dropout_scan`."""

    reverse: bool
    unroll: int | np.integer
    checkpoint_every: int | None
    parallel: bool | None

    @classmethod
    def of(cls, reverse: Any, unroll: Any, checkpoint_every: Any, parallel: Any) -> "_Loop":
        """The options, checked."""
        is_int = isinstance(unroll, int | np.integer)  # JAX takes an np.bool_ for 0 or 1 steps
        if not is_int or unroll < 0:
            error = ValueError if is_int else TypeError
            raise error(must_be("unroll", "an int of at least 0, or a bool", unroll))
        if checkpoint_every is not None:
            checkpoint_every = check_count("checkpoint_every", checkpoint_every)
        if parallel is not None:
            parallel = check_flag("parallel", parallel)
        return cls(check_flag("reverse", reverse), unroll, checkpoint_every, parallel)


class _Plan(NamedTuple):
    """The sequences of a scan's rows.

    Attributes:
      sequences: the sequence of each row at each step; None if there are no resets.
      user_ids: the caller's ids of the rows as the scan begins; None if it gave none.
      reset_carry: the carry of a new sequence.
    """

    sequences: Sequences | None
    user_ids: SequenceIds | None
    reset_carry: PyTree

    @property
    def uses_ids(self) -> bool:
        return self.user_ids is not None

    @property
    def first_ids(self) -> SequenceIds:
        """The sequences of the rows as the scan begins."""
        if self.user_ids is not None:
            return self.user_ids
        assert self.sequences is not None
        batch = self.sequences.is_first_step.shape[1:]
        first = ids_from_starts(jnp.full((1, *batch), BEFORE))
        return jax.tree.map(
            lambda first, ids: place_like(first[0], ids[0]), first, self.sequences.ids
        )

    def row_masks(self, masks: Masks, draw: Callable[[SequenceIds], Masks]) -> RowMasks | None:
        """The masks of rows that change sequences; None if none do."""
        if self.sequences is None:
            return None
        return RowMasks(masks, draw, self.first_ids, uses_ids=self.uses_ids)

    def begin(self, carry: PyTree, row_masks: RowMasks | None) -> ScanCarry:
        """The carry of the scan before the first step."""
        if self.sequences is None:
            return ScanCarry(carry)
        return ScanCarry(carry, None if row_masks is None else row_masks.first, self.first_ids)


def _plan(
    carry: PyTree,
    steps: int,
    resets: Any,
    reset_carry: PyTree,
    ids: Any,
    valid: jax.Array | None,
    start: Any,
    reverse: bool,
) -> _Plan:
    """Finds the sequence of each row at each step; checks resets, ids and reset_carry."""
    if resets is None:
        if reset_carry is not None:
            raise ValueError("reset_carry needs resets, which mark the steps that begin with it.")
        return _Plan(None, as_sequence_ids(ids), None)
    sequences = plan_sequences(resets, ids, valid, steps, start, reverse=reverse)
    reset_carry = check_reset_carry(reset_carry, carry, sequences.is_first_step.ndim - 1)
    if steps == 0:  # no row is in any sequence
        return _Plan(None, None, None)
    at = -1 if reverse else 0  # the step that runs first
    user_ids = None if ids is None else jax.tree.map(lambda ids: ids[at], sequences.ids)
    return _Plan(sequences, user_ids, reset_carry)


class _Drawn(NamedTuple):
    """The masks that a scan has before its loop.

    Attributes:
      masks: the variational ones, and those that the caller gives.
      of_rows: the masks of rows that change sequences; None if none do.
      of_steps: the masks of all steps, as far as they are drawn before the loop.
    """

    masks: Masks | None
    of_rows: RowMasks | None
    of_steps: Masks | None


def _draw(
    values_of: Callable[..., SiteValues],
    given: Masks | None,
    plan: _Plan,
    *,
    dropout: RecurrentDropout,
    rng: jax.Array | None,
    steps: int,
    start: Any,
    ahead: bool,
) -> _Drawn:
    """Draws the masks that a scan has before its loop, as far as the caller does not give them."""
    if rng is None:  # this is evaluation, or all masks are the caller's
        if plan.sequences is not None and given is not None:
            _check_resets_draw_nothing(values_of(dropout), dropout, plan.first_ids)
        return _Drawn(given, None, None)
    # With any noise inside the cell, the cell is traced, and its sites are checked.
    inside = active_noises(dropout.inside)
    values = values_of(dropout, lambda _: True) if inside else values_of(dropout)
    ids = plan.user_ids
    own = draw_sites(dropout, values, rng, ids, given=given)
    masks = own if given is None else fill_in(given, own)
    of_rows = plan.row_masks(
        masks, lambda ids: draw_sites(dropout, values, rng, ids, per_row_only=True)
    )
    if of_rows is not None and not plan.uses_ids:
        _check_uncut(start, given, of_rows.first)
    # Masks of a row that changes its id depend on the loop.
    if not ahead or (plan.sequences and plan.uses_ids):
        return _Drawn(masks, of_rows, None)
    of_steps = draw_ahead(values_of, rng, steps, dropout=dropout, start=start, ids=ids)
    return _Drawn(masks, of_rows, of_steps)


def _check_uncut(start: Any, given: Masks | None, own: Masks) -> None:
    """Raises if a piece of a cut sequence would draw a row's masks by its place.

    A reset in an earlier piece may have given the row other masks. There is no such danger if the
    caller gives all masks, as `given`.
    """
    if isinstance(start, int | np.integer) and start == 0:
        return
    for site in sites_of(own):
        masks = None if given is None else site.of(given)
        pairs = zip_prefix(f"masks.{site}", masks, site.of(own))
        if any(mask is None and jax.tree.leaves(drawn) for mask, drawn in pairs):
            raise ValueError(
                f"start={short_repr(start)}: a reset in an earlier piece may have given "
                f"dropout.{site} new masks. With resets and start, give sequence_ids too."
            )


def _check_ids(batch: tuple[int, ...], carry: PyTree, x: PyTree) -> None:
    """Raises if there is no row for each id: leaves that rows share may lack the batch dims."""

    def shapes_of(tree: PyTree) -> list[tuple[int, ...]]:
        """The shapes of the leaves that have enough dims for a batch."""
        return [np.shape(leaf) for leaf in jax.tree.leaves(tree) if np.ndim(leaf) >= len(batch)]

    name, tree = ("the carry", carry) if shapes_of(carry) else ("the input at a step", x)
    if not any(shape[: len(batch)] == batch for shape in shapes_of(tree)):
        raise ValueError(
            f"sequence_ids must be [*batch], an id for each row, got shape {batch} for {name} "
            f"{short_tree_repr(tree)}; ids [time, *batch] need resets."
        )


def at_a_step(xs: PyTree) -> PyTree:
    """The shapes and dtypes of the inputs at a step."""
    return jax.tree.map(type_at_a_step, xs)


def _check_resets_draw_nothing(
    values: SiteValues, dropout: RecurrentDropout, ids: SequenceIds
) -> None:
    """Raises if rows have variational masks of their own, which a reset would draw anew."""

    def draw(rng: jax.Array) -> Masks:
        return draw_sites(dropout, values, rng, ids, per_row_only=True)

    if jax.tree.leaves(jax.eval_shape(draw, jax.random.key(0))):  # any key will do
        raise ValueError("a reset draws new variational masks, so it needs rng; got rng=None.")


def count_steps(xs: PyTree) -> int:
    """The number of steps: the length of the leading axis of all inputs."""
    shapes = {f"xs{keystr(path)}": np.shape(leaf) for path, leaf in tree_leaves_with_path(xs)}
    if not shapes:
        raise ValueError("xs has no arrays; give the inputs as arrays [time, ...].")
    lengths = {shape[:1] for shape in shapes.values()}
    if len(lengths) > 1 or lengths == {()}:
        listed = ", ".join(f"{name} {shape}" for name, shape in [*shapes.items()][:_LISTED])
        listed += ", ..." if len(shapes) > _LISTED else ""
        raise ValueError(f"the arrays of xs must share their leading axis, time; got {listed}.")
    return lengths.pop()[0]
