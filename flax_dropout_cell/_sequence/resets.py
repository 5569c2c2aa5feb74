"""Several sequences in one scan: resets of the carry, and new masks for a row that resets."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from .._arguments import as_ints
from .._sharding import broadcast_like
from .._spec.prefixes import broadcasts, structure_str, weaken_like
from .._spec.recurrent_dropout import Masks, PyTree, Site, make_masks, sites_of
from .._step.sequence_ids import SequenceIds, ids_from_starts, split_words
from .padding import check_bools, keep_rows, select_rows

# The first step of sequences that began before this scan. Steps are below 2**31, so none is equal.
BEFORE = np.uint32(2**32 - 1)


class Sequences(NamedTuple):
    """The sequence of each row at each step.

    Attributes:
      is_first_step: bool `[time, *batch]`: the row's carry starts anew before this step runs.
      ids: the sequence that the row is in, `[time, *batch]`: the caller's id; without one, the
        absolute index of the sequence's first step and the row's place. That index is `BEFORE` for
        the sequence that was running when the scan began.
    """

    is_first_step: jax.Array
    ids: SequenceIds


def plan_sequences(
    resets: Any,
    sequence_ids: Any,
    valid: jax.Array | None,
    steps: int,
    start: Any,
    *,
    reverse: bool,
) -> Sequences:
    """The sequences that `resets` and `sequence_ids` describe."""
    resets = check_bools("resets", resets, steps)
    if valid is not None:
        if valid.shape != resets.shape:
            raise ValueError(f"resets {resets.shape} and padding {valid.shape} differ in shape.")
        resets &= valid  # nothing begins in padding
    if sequence_ids is None:
        ids = _ids_from_resets(resets, steps, start)
    else:
        given = as_ints("sequence_ids", sequence_ids)
        if given.shape != resets.shape:
            raise ValueError(
                f"sequence_ids must have the shape {resets.shape} of resets, got {given.shape}."
            )
        ids = split_words(given)
    return Sequences(_begin_backward(resets, valid) if reverse else resets, ids)


def _ids_from_resets(resets: jax.Array, steps: int, start: Any) -> SequenceIds:
    indices = jnp.arange(steps, dtype=jnp.int32).reshape((steps,) + (1,) * (resets.ndim - 1))
    first = jax.lax.cummax(jnp.where(resets, indices, jnp.int32(-1)), axis=0)
    absolute = first.astype(jnp.uint32) + jnp.asarray(start).astype(jnp.uint32)
    return ids_from_starts(jnp.where(first < 0, BEFORE, absolute))


def _begin_backward(resets: jax.Array, valid: jax.Array | None) -> jax.Array:
    """The first steps of a backward scan: each sequence's own last step.

    Padding between two sequences belongs to neither.
    """
    end = jnp.zeros_like(resets.any(0))
    if valid is None:
        return jnp.concatenate([resets, end[None]])[1:]

    def step(later: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        reset, valid = now
        return select_rows(valid, reset, later), valid & later

    return jax.lax.scan(step, end, (resets, valid), reverse=True)[1]


def reset_carry_rows(is_first_step: jax.Array, carry: PyTree, reset_carry: PyTree) -> PyTree:
    """The carry, with `reset_carry` in the rows that begin a sequence."""

    def spread(fresh: Any, old: jax.Array) -> jax.Array:
        return weaken_like(jnp.broadcast_to(jnp.asarray(fresh, old.dtype), old.shape), old)

    return keep_rows(~is_first_step, carry, jax.tree.map(spread, reset_carry, carry))


def check_reset_carry(reset_carry: PyTree, carry: PyTree, batch_ndim: int) -> PyTree:
    """The carry of a new sequence, zeros by default; raises if it does not fit the carry."""
    if reset_carry is None:
        for path, leaf in tree_leaves_with_path(carry):
            is_key = jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
            if is_key and np.ndim(leaf) >= batch_ndim:
                raise ValueError(
                    f"carry{keystr(path)} holds keys, and a reset would replace each with the key "
                    f"of zeros: give reset_carry."
                )
        return jax.tree.map(lambda leaf: jnp.zeros((), jnp.result_type(leaf)), carry)
    if jax.tree.structure(reset_carry) != jax.tree.structure(carry):
        got, wanted = structure_str(reset_carry), structure_str(carry)
        raise ValueError(f"reset_carry has the structure {got}, but the carry has {wanted}.")
    leaves = zip(tree_leaves_with_path(reset_carry), jax.tree.leaves(carry), strict=True)
    for (path, fresh), leaf in leaves:
        if not broadcasts(np.shape(fresh), np.shape(leaf)):
            got = f"reset_carry{keystr(path)} has shape {np.shape(fresh)}"
            raise ValueError(f"{got}, which does not broadcast to the carry's {np.shape(leaf)}.")
    return reset_carry


class RowMasks:
    """The masks of a scan whose rows change from one sequence to another.

    Masks of weights, and masks that rows share, stay the same. The others are part of the scan's
    carry.

    Args:
      masks: the masks of the sequences that run when the scan begins.
      draw: draws the masks that rows do not share, and None for the others.
      ids: the sequences of the rows as the scan begins.
      uses_ids: True if the caller gave ids; otherwise a row's sequence is known by its first step.
    """

    def __init__(
        self,
        masks: Masks,
        draw: Callable[[SequenceIds], Masks],
        ids: SequenceIds,
        *,
        uses_ids: bool,
    ):
        self._masks, self._draw, self._uses_ids = masks, draw, uses_ids
        drawn = jax.eval_shape(draw, ids)

        def pick(drawn: Any, mask: Any) -> Any:
            if drawn is None:
                return None
            return broadcast_like(mask, drawn).astype(drawn.dtype)

        self.first: Masks = _map_masks(pick, drawn, masks)

    def redraw(self, own: Masks, ids: SequenceIds, new_ids: SequenceIds) -> Masks:
        """The masks, drawn again for rows whose sequence has changed."""
        changed = (ids.low != new_ids.low) | (ids.high != new_ids.high)

        def redraw(own: Masks) -> Masks:
            drawn = self._draw(new_ids)
            if not self._uses_ids:
                # A backward scan ends in the sequence that was running before the first step. Its
                # masks are the call's own, not those of its first step.
                ran_before = new_ids.low == BEFORE
                drawn = jax.tree.map(
                    lambda first, new: select_rows(ran_before, first, new), self.first, drawn
                )
            return jax.tree.map(lambda new, old: select_rows(changed, new, old), drawn, own)

        # A draw at each step would cost as much as per-step masks; resets are rare.
        return jax.lax.cond(jnp.any(changed), redraw, lambda own: own, own)

    def merge_shared(self, own: Masks) -> Masks:
        """All masks: the rows' own, and those that rows share."""
        return _map_masks(lambda mine, mask: mask if mine is None else mine, own, self._masks)


def _map_masks(pick: Callable[[Any, Any], Any], own: Masks, masks: Masks) -> Masks:
    """Maps pairs of masks; `own` has None where `masks` has masks that rows share."""

    # Site by site, because `own` leaves out the sites inside a cell of which it has no mask.
    def at(site: Site) -> PyTree:
        mine, whole = site.of(own), site.of(masks)
        if mine is None:
            return pick(None, whole)
        return jax.tree.map(pick, mine, whole, is_leaf=lambda node: node is None)

    return make_masks({site: at(site) for site in sites_of(masks)})
