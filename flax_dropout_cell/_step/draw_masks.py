"""Masks, from the call to the bits: every site, every leaf, every row.

Read from top to bottom: `draw_masks` finds the shape of each site's value, `draw_sites` and
`draw_site` give each leaf a key of its own, and `draw_leaf` draws one mask, row by row if rows
have ids. The bits themselves come from `_random`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._random.keys import as_rng, fold_in, is_threefry, leaf_rng, need_rng
from .._sharding import check_shards_differ, draw_like
from .._spec.match_leaves import Leaf, match_leaves
from .._spec.prefixes import broadcasts, dtype_of
from .._spec.recurrent_dropout import (
    PARAMS,
    Masks,
    PyTree,
    RecurrentDropout,
    Site,
    SiteValues,
    active_noises,
    draws_once,
    make_masks,
    sites_of,
)
from ..noises.protocol import Noise, shared_dims
from .call_cell import Cell, trace_cell
from .checks import as_sequence_ids, as_spec
from .sequence_ids import SequenceIds

IsDrawn = Callable[[PyTree], bool]
"""Selects noises by when they draw: `draws_once`, `draws_at_each_step`, or either."""


def draw_masks(
    params: PyTree,
    carry: PyTree,
    x: PyTree,
    rng: jax.Array | None,
    *,
    cell: Cell,
    dropout: RecurrentDropout,
    sequence_ids: jax.typing.ArrayLike | None = None,
) -> Masks:
    """Draws the masks of the variational noises, for one sequence.

    Call it before the loop, once per sequence, and pass the result to every `dropout_cell` of
    that sequence (Gal and Ghahramani 2016, arXiv:1512.05287, section 4). Each mask depends on
    `rng`, its site, its leaf and its noise.

    Args:
      params: the cell's weights.
      carry: a carry. Only the shapes and dtypes of `carry`, `params` and `x` are used, so each
        may be a `jax.ShapeDtypeStruct`.
      x: the input at one step, without the time axis.
      rng: the sequence's key. May be None if every noise is the identity.
      cell: `cell(params, carry, x) -> (carry, y)`. It is only traced, for the shapes of its output
        and of its sites inside.
      dropout: the noise at each site.
      sequence_ids: ints `[*batch]`. A row's masks then depend on its id, not on its place.

    Returns:
      `Masks` with the variational leaves filled in, None elsewhere.

    Raises:
      ValueError: if noise does not fit the value at its site, would make a value explode, or has
        no key to draw from.
      TypeError: if a value with noise is not floating-point, or an argument has the wrong type.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> spec = fdc.RecurrentDropout(output=fdc.Dropout(keep_prob=0.8, variational=True))
      >>> masks = fdc.draw_masks(
      ...     None, jnp.zeros((4, 8)), jnp.ones((4, 8)), jax.random.key(0),
      ...     cell=lambda params, h, x: (h, x + h), dropout=spec,
      ... )
      >>> masks.output.shape, masks.state
      ((4, 8), None)
    """
    key = as_rng(rng)
    dropout = as_spec(dropout, carry, cell)
    ids = as_sequence_ids(sequence_ids)
    if key is None and not active_noises(dropout):
        return Masks()
    key = need_rng("draw_masks", key)
    values = site_values(params, carry, x, cell, dropout)
    return draw_sites(dropout, values, key, ids)


def site_values(
    params: PyTree,
    carry: PyTree,
    x: PyTree,
    cell: Cell,
    dropout: RecurrentDropout,
    is_drawn: IsDrawn = draws_once,
) -> SiteValues:
    """The values, or their shapes and dtypes, that masks are drawn for.

    If no mask is drawn at `output` or `inside`, these are left out, which saves a trace of the
    cell.
    """
    # Params, x and the carry are at hand. Only a trace of the cell shows its y and its sites.
    y, inside = None, {}
    if is_drawn(dropout.output) or is_drawn(dropout.inside):
        y, inside = trace_cell(cell, params, carry, x, inside_names(dropout))
    return SiteValues(params=params, input=x, state=carry, output=y, inside=inside)


def inside_names(dropout: RecurrentDropout) -> frozenset[str]:
    """The sites inside a cell that have noise."""
    return frozenset(name for name, prefix in dropout.inside.items() if active_noises(prefix))


def draw_sites(
    dropout: RecurrentDropout,
    values: SiteValues,
    rng: jax.Array,
    ids: SequenceIds | None = None,
    *,
    is_drawn: IsDrawn = draws_once,
    given: Masks | None = None,
    per_row_only: bool = False,
) -> Masks:
    """Draws the masks for `values`: each site's value, or its shapes and dtypes.

    `is_drawn` tells the variational noises from the per-step ones, for which `rng` is the step's
    key. Masks that the caller gives are not drawn.
    """
    options: dict[str, Any] = {
        "is_drawn": is_drawn,
        "given": given,
        "per_row_only": per_row_only,
    }
    with jax.named_scope("draw_masks" if is_drawn is draws_once else "draw_step_masks"):
        return make_masks(
            {
                site: draw_site(site, dropout, site.of(values), rng, ids, **options)
                for site in sites_of(values)
            }
        )


def draw_site(
    site: Site,
    dropout: RecurrentDropout,
    value: PyTree,
    rng: jax.Array,
    ids: SequenceIds | None = None,
    *,
    is_drawn: IsDrawn = draws_once,
    given: Masks | None = None,
    per_row_only: bool = False,
) -> PyTree:
    """`draw_sites` at one site. If `per_row_only`, it draws only masks that rows do not share."""
    if not is_drawn(site.of(dropout)):
        return None

    def draw(index: int, leaf: Leaf) -> jax.Array | None:
        if leaf.noise is None or leaf.mask is not None or not is_drawn(leaf.noise):
            return None
        by_row = ids is None or _has_mask_per_row(site, leaf.noise, leaf.value, ids)
        if per_row_only and not by_row:
            return None
        return draw_leaf(site, leaf.noise, site_rng(rng, site, index), leaf.value, ids)

    # Leaves without noise count too, so that noise on one leaf moves no mask of another.
    leaves, structure = match_leaves(site, dropout, given, value)
    return jax.tree.unflatten(structure, [draw(*pair) for pair in enumerate(leaves)])


def site_rng(rng: jax.Array, site: Site, index: int) -> jax.Array:
    """The key of a leaf's mask."""
    if site.inside:
        return leaf_rng(rng, "inside", index, inside=site.name)
    return leaf_rng(rng, site.name, index)


def draw_leaf(
    site: Site, noise: Noise, rng: jax.Array, leaf: Any, ids: SequenceIds | None
) -> jax.Array:
    """Draws one leaf's mask; raises if it does not broadcast to the leaf."""
    shape, dtype = tuple(np.shape(leaf)), dtype_of(leaf)
    if ids is not None and not _has_mask_per_row(site, noise, leaf, ids):
        ids = None
    by_row = has_mask_per_row(site, noise, shape, 1)  # shards divide the first dim
    if site == PARAMS or by_row:
        by_ids = ", or give sequence_ids=, the index of each row in the whole batch"
        otherwise = by_ids if by_row else ""
        check_shards_differ(f"dropout.{site}: the value", leaf, (rng, ids), otherwise)

    def draw(noise: Noise, rng: jax.Array, ids: SequenceIds | None) -> jax.Array:
        if ids is None:
            return _draw_mask(noise, rng, shape, dtype)
        return draw_rows(noise, rng, shape, dtype, ids)

    mask = draw_like(leaf, draw, noise, rng, ids)
    if not broadcasts(np.shape(mask), shape):
        raise ValueError(
            f"dropout.{site}: {type(noise).__name__}.draw_mask gave the shape {np.shape(mask)}, "
            f"which does not broadcast to the value's shape {shape}."
        )
    # A mask of the user's noise may have fewer dims than the value; hosts index rows and steps.
    return jnp.reshape(mask, (1,) * (len(shape) - np.ndim(mask)) + np.shape(mask))


def _draw_mask(noise: Noise, rng: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    mask: jax.Array | None = noise.draw_mask(rng, shape, dtype)
    if mask is None:  # a user's noise may forget its return
        raise TypeError(f"{type(noise).__name__}.draw_mask gave None; it must return an array.")
    return mask


def _has_mask_per_row(site: Site, noise: Noise, leaf: Any, ids: SequenceIds) -> bool:
    """`has_mask_per_row`; raises if the value lacks the batch dims of the ids."""
    shape = tuple(np.shape(leaf))
    if site != PARAMS and shape[: len(ids.batch)] != ids.batch:
        raise ValueError(
            f"a value at {site} has shape {shape} at a step, which does not start with the batch "
            f"dims of sequence_ids or resets, {ids.batch}."
        )
    return has_mask_per_row(site, noise, shape, len(ids.batch))


def has_mask_per_row(site: Site, noise: Noise, shape: tuple[int, ...], batch_ndim: int) -> bool:
    """Whether each row has a mask of its own; weights, and masks shared over the batch, do not."""
    return site != PARAMS and not any(dim < batch_ndim for dim in shared_dims(noise, shape))


def draw_rows(
    noise: Noise, rng: jax.Array, shape: tuple[int, ...], dtype: Any, ids: SequenceIds
) -> jax.Array:
    """Draws each row's mask from the row's own key."""
    batch_ndim = len(ids.batch)
    dims = shared_dims(noise, shape)
    if dims:  # a row has no batch dims
        inner = tuple(dim - batch_ndim for dim in dims)
        noise = dataclasses.replace(noise, broadcast_dims=inner)  # type: ignore[type-var]

    def draw_row(row: SequenceIds) -> jax.Array:
        row_rng = fold_in(fold_in(rng, row.low), row.high)
        return _draw_mask(noise, row_rng, shape[batch_ndim:], dtype)

    flat = jax.tree.map(lambda words: words.reshape(math.prod(ids.batch)), ids)
    # Under vmap, JAX's rbg gives all rows the bits of the first key, and the bytes of as many rows
    # as a symbolic batch has cannot be exported.
    at_once = is_threefry(rng) and all(isinstance(size, int) for size in ids.batch)
    masks = jax.vmap(draw_row)(flat) if at_once else jax.lax.map(draw_row, flat)
    # A row's mask may have fewer dims than the row, to which it broadcasts.
    missing = len(shape) - batch_ndim - (masks.ndim - 1)
    return masks.reshape(ids.batch + (1,) * missing + masks.shape[1:])
