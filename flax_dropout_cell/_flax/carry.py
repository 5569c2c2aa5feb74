"""A Flax wrapper's carry, in which masks go from step to step.

A *host* is Flax's own RNN layer, or a loop of the user's, around the wrapper: it asks for the carry
before its loop and passes it on.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._messages import short_repr, with_article
from .._random.keys import as_key
from .._spec.recurrent_dropout import (
    Masks,
    PyTree,
    RecurrentDropout,
    SiteValues,
    active_noises,
    draws_at_each_step,
)
from .._step.call_cell import Cell
from .._step.draw_masks import draw_sites
from .._step.dropout_cell import dropout_cell
from .spec_fingerprint import (
    SpecFingerprint,
    check_fingerprint,
    fingerprint_of,
    fixed_arrays,
    with_fixed_arrays,
)


class StepRng(NamedTuple):
    """A sequence's key, as raw data so that it can be saved, and the index of its next step.

    Both have an axis of length 1, since `nn.RNN` and `nnx.RNN` index every leaf of a carry with
    `[time, batch]` when they are given `seq_lengths` and `return_carry`. That turns the axis into
    one of length batch, with each row at its own step.
    """

    key: jax.Array
    step: jax.Array


class DropoutCarry(NamedTuple):
    """The carry of `DropoutCell`: the cell's own, and the randomness of the running sequence.

    It is a NamedTuple of arrays, which `flax.serialization` and Orbax save. Passed to the next
    window, it continues the sequence, as if one long sequence had been cut. To keep the state and
    draw new masks, call `redraw_masks` of the wrapper.

    Take the cell's own carry by its name: `c, h = carry.cell_carry`. A row's per-step masks depend
    on its place: a part of a carry (a microbatch, a shard) has those of rows 0, 1 and so on, not
    those of the rows that it was cut from. For parts with masks of their own use the layer `RNN`
    with `sequence_ids`.

    Attributes:
      cell_carry: the wrapped cell's carry, such as an LSTM's `(c, h)`.
      masks: the variational masks of this sequence; None in evaluation.
      rng: the key and step of the per-step masks; None if there are none.
      arrays: the arrays that the masks were drawn with, such as a scheduled keep_prob. A
        `reparameterized` noise keeps none here, because its masks do not depend on its numbers.
      fingerprint: the spec that the masks were drawn for, as text. Orbax does not save it, so
        restore into a carry of the same spec: masks of another would not be noticed.
    """

    cell_carry: Any
    masks: Masks | None
    rng: StepRng | None
    arrays: Any = None
    fingerprint: SpecFingerprint | None = None


def start_sequence(
    cell_carry: PyTree, rng: jax.Array, dropout: RecurrentDropout, values: SiteValues
) -> DropoutCarry:
    """Draws a sequence's masks for `values`, each site's value or its shapes and dtypes."""
    key = as_key("rng", rng)
    masks = draw_sites(dropout, values, key)
    # Weights have no batch dim for a host to index, so their masks get one of length 1.
    masks = masks._replace(params=jax.tree.map(lambda mask: mask[None], masks.params))
    step_rng = None
    if draws_at_each_step(dropout) or _depend_on_dtype(masks):
        step_rng = StepRng(jax.random.key_data(key)[None], jnp.zeros((1,), jnp.int32))
    arrays = tuple(jnp.asarray(array)[None] for array in fixed_arrays(dropout))
    leaves = jax.tree.leaves(values.input)
    fingerprint = SpecFingerprint(
        fingerprint_of(dropout),
        input_dtypes=tuple(str(leaf.dtype) for leaf in leaves),
        prng=jax.random.key_impl(key),
        input_shapes=tuple(tuple(leaf.shape) for leaf in leaves),
    )
    return DropoutCarry(cell_carry, masks, step_rng, arrays or None, fingerprint)


def run_wrapped_step(
    carry: DropoutCarry,
    x: PyTree,
    *,
    cell: Cell,
    params: PyTree,
    dropout: RecurrentDropout,
    deterministic: bool,
    values: Callable[[PyTree], SiteValues],
) -> tuple[DropoutCarry, PyTree]:
    """One step of a wrapped cell.

    Args:
      carry: the wrapper's carry.
      x: the input.
      cell: the wrapped cell, `cell(params, carry, x) -> (carry, y)`.
      params: its weights if there is noise on them; None if the cell is to read its own.
      dropout: the noise at each site.
      deterministic: if True, this is evaluation.
      values: each site's shapes and dtypes for an input.

    Returns:
      The next carry, and the output.
    """
    if deterministic or (carry.masks is None and not active_noises(dropout)):
        spec = dropout if params is not None else _without_weights(dropout)
        cell_carry, y = dropout_cell(params, carry.cell_carry, x, None, cell=cell, dropout=spec)
        return carry._replace(cell_carry=cell_carry), y
    if carry.masks is None:
        raise ValueError("the carry was made in evaluation and has no masks: call redraw_masks.")
    check_fingerprint(carry.fingerprint, dropout)
    spec, masks = dropout, carry.masks
    _check_not_sliced(masks, carry, x)
    _check_batch(masks, carry.fingerprint, x)
    if carry.arrays is not None:
        # Before the weights are left out, since the arrays are those of all sites.
        spec = with_fixed_arrays(dropout, [_first(array) for array in carry.arrays])
    if params is None:
        spec, masks = _without_weights(spec), masks._replace(params=None)
    masks = masks._replace(params=jax.tree.map(_first, masks.params))
    rng, step, next_rng = None, None, carry.rng
    if carry.rng is not None:
        prng = carry.fingerprint.prng if isinstance(carry.fingerprint, SpecFingerprint) else None
        rng = jax.random.wrap_key_data(_first(carry.rng.key), impl=prng)
        # If rows are at different steps, the furthest counts, so that no row sees a mask twice.
        step = jnp.max(carry.rng.step)
        next_rng = carry.rng._replace(step=jnp.full_like(carry.rng.step, step + 1))
        if _drawn_for_other_dtypes(carry, x):
            masks = _redraw_for_dtypes(masks, spec, values(x), rng)
    cell_carry, y = dropout_cell(
        params, carry.cell_carry, x, rng, cell=cell, dropout=spec, masks=masks, step=step
    )
    return carry._replace(cell_carry=cell_carry, rng=next_rng), y


def _without_weights(dropout: RecurrentDropout) -> RecurrentDropout:
    return dataclasses.replace(dropout, params=None)


def check_carry(carry: Any) -> None:
    """Raises if a carry is not a wrapper's."""
    if not isinstance(carry, DropoutCarry):
        got = short_repr(carry) if hasattr(carry, "shape") else with_article(type(carry).__name__)
        raise TypeError(
            f"the carry must be a DropoutCarry, got {got}: start with initialize_carry, or write "
            f"cell.redraw_masks(carry, x, key) to start from a carry of the wrapped cell; x is the "
            f"input of one step."
        )


def _check_not_sliced(masks: Masks, carry: DropoutCarry, x: PyTree) -> None:
    """Raises if a carry is a part of another, or several that were joined."""
    shared = jax.tree.leaves((masks.params, carry.rng, carry.arrays))
    # 1, or the batch if a host has indexed it: see `StepRng`.
    sizes = {1, *(size for leaf in jax.tree.leaves(x) for size in np.shape(leaf)[:1])} - {0}
    if any(leaf.shape[0] not in sizes for leaf in shared):
        raise ValueError(
            "a DropoutCarry was sliced or joined with another, but its rows share a key and the "
            "masks of weights. For parts of a batch use the layer RNN with sequence_ids."
        )


def _check_batch(masks: Masks, fingerprint: SpecFingerprint | None, x: PyTree) -> None:
    """Raises if masks that were drawn for one row would be shared by all rows of a batch."""
    of_rows = jax.tree.leaves(masks._replace(params=None))
    if not isinstance(fingerprint, SpecFingerprint) or not of_rows:
        return
    input_shapes = map(np.shape, jax.tree.leaves(x))
    # If the inputs have another structure, the cell raises.
    for drawn, here in zip(fingerprint.input_shapes, input_shapes, strict=False):
        sizes = zip(drawn, here, strict=False)
        if len(drawn) == len(here) and any(was == 1 != now for was, now in sizes):
            raise ValueError(
                f"the carry's masks were drawn for an input of shape {drawn}, and this one has "
                f"{here}: its rows would share masks. Call redraw_masks for this batch."
            )


def _first(leaf: jax.Array) -> jax.Array:
    return leaf[0]


def _depend_on_dtype(masks: Masks) -> bool:
    """Whether a mask was drawn in the dtype of a value that is not there yet.

    Hosts say the inputs' shape, not their dtype, when they start a sequence. For boolean masks it
    does not matter.
    """
    drawn = jax.tree.leaves((masks.input, masks.output, masks.inside))
    return any(mask.dtype != jnp.bool_ for mask in drawn)


def _drawn_for_other_dtypes(carry: DropoutCarry, x: PyTree) -> bool:
    if not isinstance(carry.fingerprint, SpecFingerprint) or carry.masks is None:
        return False
    here = tuple(str(jnp.result_type(leaf)) for leaf in jax.tree.leaves(x))
    return here != carry.fingerprint.input_dtypes and _depend_on_dtype(carry.masks)


def _redraw_for_dtypes(
    masks: Masks, dropout: RecurrentDropout, values: SiteValues, rng: jax.Array
) -> Masks:
    """Draws masks again for inputs of another dtype than at the start, with the same bits."""
    unknown = dataclasses.replace(dropout, params=None, state=None)
    drawn = draw_sites(unknown, values._replace(params=None, state=None), rng)
    return masks._replace(input=drawn.input, output=drawn.output, inside=drawn.inside)
