"""Masks of all steps at once, for noises that draw a fresh mask at every step."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._random.keep_masks import bits_per_unit
from .._random.keys import as_rng, is_threefry, need_rng, step_rng
from .._spec.prefixes import is_prefix_leaf
from .._spec.recurrent_dropout import (
    Masks,
    PyTree,
    RecurrentDropout,
    SiteValues,
    active_noises,
    draws_at_each_step,
)
from .._step.call_cell import Cell
from .._step.checks import as_sequence_ids, as_spec, check_start, check_step
from .._step.draw_masks import draw_sites, site_values
from .._step.sequence_ids import SequenceIds
from ..noises.base import NamedNoise

# Masks of more steps than fit stay in the loop. Long sequences and wide cells gain little from
# one draw for all steps anyway. Draws in chunks of steps, each chunk a scan of its own, were tried:
# they gain nothing over draws in the loop, and the gradient takes longer.
MAX_BYTES = 16 * 2**20


def draw_step_masks(
    params: PyTree,
    carry: PyTree,
    x: PyTree,
    rng: jax.Array | None,
    num_steps: int,
    *,
    cell: Cell,
    dropout: RecurrentDropout,
    start: int | jax.Array = 0,
    sequence_ids: jax.typing.ArrayLike | None = None,
) -> Masks:
    """Draws the masks of the per-step noises for all steps of a sequence, as arrays.

    They are the masks that `dropout_scan` draws from the same key, bit for bit. Use them for a
    loop or a kernel of your own, together with the variational masks of `draw_masks`.

    Args:
      params: the cell's weights.
      carry: a carry. Only the shapes and dtypes of `carry`, `params` and `x` are used, so each
        may be a `jax.ShapeDtypeStruct`.
      x: the input at one step, without the time axis.
      rng: the sequence's key. May be None if every noise is the identity.
      num_steps: the number of steps.
      cell: `cell(params, carry, x) -> (carry, y)`; never run, only traced for the shapes of its
        output and of its sites inside.
      dropout: the noise at each site.
      start: the absolute index of the first step.
      sequence_ids: ints `[*batch]`. A row's masks then depend on its id, not on its place.

    Returns:
      `Masks` with a mask `[time, ...]` for each leaf with a per-step noise, None elsewhere.

    Raises:
      ValueError: if noise has no key to draw from or does not fit the value at its site,
        `num_steps` or `start` is negative, or `start + num_steps` is above 2**31.
      TypeError: if an argument has the wrong type.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> spec = fdc.RecurrentDropout(output=fdc.Dropout(keep_prob=0.8))
      >>> masks = fdc.draw_step_masks(
      ...     None, jnp.zeros((4, 8)), jnp.ones((4, 8)), jax.random.key(0), 20,
      ...     cell=lambda params, h, x: (h, x + h), dropout=spec,
      ... )
      >>> masks.output.shape, masks.state
      ((20, 4, 8), None)
    """
    dropout = as_spec(dropout, carry, cell)
    check_step("num_steps", num_steps)
    check_start(start, num_steps)
    key = as_rng(rng)
    if key is None and not active_noises(dropout):
        return Masks()
    key = need_rng("draw_step_masks", key)
    values = site_values(params, carry, x, cell, dropout, draws_at_each_step)
    return draw_all_steps(dropout, values, key, num_steps, start, as_sequence_ids(sequence_ids))


def draw_ahead(
    values_of: Callable[..., SiteValues],
    rng: jax.Array,
    steps: int,
    *,
    dropout: RecurrentDropout,
    start: Any,
    ids: SequenceIds | None,
) -> Masks | None:
    """Draws the masks of all steps that are faster to draw before a loop than in it.

    A small kernel at each step costs more to start than to run. Masks of weights are as large as
    the weights and stay in the loop; so do masks of one to four bits a unit, which are as cheap to
    draw as to read.

    Args:
      values_of: gives the shapes at the sites of a spec, as far as they are needed.
      rng: the sequence's key, typed.
      steps: the number of steps.
      dropout: the noise at each site.
      start: the absolute index of the first step.
      ids: the ids that rows draw by; None if they draw by their place.

    Returns:
      The masks, `[time, ...]`; None if there are none.
    """
    ahead = jax.tree.map(
        lambda entry: entry if _is_faster_ahead(entry) else None,
        dataclasses.replace(dropout, params=None),
        is_leaf=is_prefix_leaf,
    )
    if not is_threefry(rng) or not draws_at_each_step(ahead) or not isinstance(steps, int):
        return None

    values = values_of(ahead, draws_at_each_step)

    def draw() -> Masks:
        return draw_all_steps(ahead, values, rng, steps, start, ids)

    shapes = [mask.shape for mask in jax.tree.leaves(jax.eval_shape(draw))]
    if not all(isinstance(size, int) for shape in shapes for size in shape):
        return None
    return draw() if sum(map(math.prod, shapes)) <= MAX_BYTES else None


def _is_faster_ahead(entry: Any) -> bool:
    name = _keep_mask_field(entry)
    return name is not None and not entry.variational and bits_per_unit(getattr(entry, name)) == 8


def _keep_mask_field(entry: Any) -> str | None:
    """The field that a noise's keep-mask is drawn from; None if it draws another kind of mask."""
    # Not inherited: a subclass may draw in another way.
    return vars(type(entry)).get("keep_mask_field") if isinstance(entry, NamedNoise) else None


def draw_all_steps(
    dropout: RecurrentDropout,
    values: SiteValues,
    rng: jax.Array,
    steps: int,
    start: Any,
    ids: SequenceIds | None,
) -> Masks:
    """Draws the masks of the per-step noises at all steps."""

    def draw(step: jax.Array) -> Masks:
        key = step_rng(rng, step)
        return draw_sites(dropout, values, key, ids, is_drawn=draws_at_each_step)

    drawn = [noise for noise in active_noises(dropout) if not noise.variational]
    indices = jnp.asarray(start).astype(jnp.uint32) + jnp.arange(steps, dtype=jnp.uint32)
    if is_threefry(rng) and all(map(_keep_mask_field, drawn)):
        return jax.vmap(draw)(indices)
    # Under vmap, rbg gives all keys the bits of the first, and noises that compute with their bits
    # may round differently.
    return jax.lax.map(draw, indices)
