"""`plot_masks`: a picture of which units a spec keeps and drops over time."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from ._disturb import draw_site, inside_names
from ._inside import Cell, trace_cell
from ._leaky import family_of, place_state
from ._random.keys import as_rng, step_rng
from ._scan import count_steps
from ._sites import PARAMS, Masks, PyTree, RecurrentDropout, Site, active_noises, sites_of
from ._step import check_dropout
from ._trees import dtype_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Strips = dict[str, np.ndarray]


def plot_masks(
    params: PyTree,
    carry: PyTree,
    xs: PyTree,
    rng: jax.Array,
    *,
    cell: Cell,
    dropout: RecurrentDropout,
    start: int = 0,
    row: int = 0,
    max_units: int = 32,
) -> "Figure":
    """Plots which units one row of a batch keeps and drops over time, a strip for each place.

    The masks are those of `dropout_scan` with the same arguments. A variational mask is stripes,
    for it is the same at all steps; a per-step mask is snow. What no boolean mask says, such as
    Gaussian noise, is shades of grey. Needs matplotlib: `pip install 'flax_dropout_cell[plots]'`.

    Args:
      params: the cell's weights; of these, `carry` and `xs` only the shapes are used.
      carry: a carry.
      xs: the inputs, a pytree of arrays `[time, *batch, ...]`.
      rng: the sequence's key.
      cell: `cell(params, carry, x) -> (carry, y)`; it is traced, not run.
      dropout: which noise sits where.
      start: the absolute index of the first step.
      row: which row of the batch, counted through all batch dims.
      max_units: how many units of each place are shown.

    Returns:
      A matplotlib figure.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: nothing is disturbed, or as `dropout_scan`.
      TypeError: as `dropout_scan`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> params = fdc.init_gru(jax.random.key(0), 8, 16)
      >>> spec = fdc.RecurrentDropout(
      ...     input=fdc.Dropout(keep_prob=0.5, variational=True),
      ...     output=fdc.Dropout(keep_prob=0.5),
      ... )
      >>> figure = fdc.plot_masks(
      ...     params, jnp.zeros((4, 16)), jnp.ones((30, 4, 8)), jax.random.key(1),
      ...     cell=fdc.gru_cell, dropout=spec,
      ... )
      >>> [axes.get_title(loc="left") for axes in figure.axes]
      ['input', 'output']
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "plot_masks needs matplotlib: pip install 'flax_dropout_cell[plots]'."
        ) from None
    strips = draw_strips(params, carry, xs, rng, cell=cell, dropout=dropout, start=start, row=row)
    if not strips:
        raise ValueError("dropout has no noise that draws, so there are no masks to plot.")
    shown = {path: strip[:max_units] for path, strip in strips.items()}
    heights = [len(strip) for strip in shown.values()]
    figure = Figure(figsize=(7, 0.6 + 0.4 * len(shown) + 0.04 * sum(heights)), layout="constrained")
    grid = figure.subplots(len(shown), sharex=True, squeeze=False, height_ratios=heights)
    for axes, (path, strip) in zip(grid[:, 0], shown.items(), strict=True):
        steps = (start - 0.5, start + strip.shape[1] - 0.5)
        limits = {"vmin": 0, "vmax": 1} if strip.dtype == bool else {}
        axes.imshow(
            strip,
            cmap="Blues",
            aspect="auto",
            interpolation="nearest",
            extent=(*steps, len(strip) - 0.5, -0.5),
            **limits,
        )
        axes.set_title(path, loc="left", fontsize="medium")
        axes.set_ylabel("unit")
        axes.set_yticks([])
    grid[-1, 0].set_xlabel("step (dark: kept, white: dropped)")
    return figure


def draw_strips(
    params: PyTree,
    carry: PyTree,
    xs: PyTree,
    rng: jax.Array,
    *,
    cell: Cell,
    dropout: RecurrentDropout,
    start: int,
    row: int,
) -> Strips:
    """The masks of one row over time, `[units, time]`, by the paths of what they disturb."""
    check_dropout(dropout)
    key = as_rng(rng)
    if key is None:
        raise ValueError("plot_masks needs a key such as jax.random.key(0), got rng=None.")
    dropout = place_state(dropout, carry, family_of(cell))
    steps = count_steps(xs)
    x = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], dtype_of(leaf)), xs)
    y, inside = trace_cell(cell, params, carry, x, inside_names(dropout))
    values = Masks(params, x, carry, y, inside)
    strips: Strips = {}
    for site in sites_of(dropout):
        if active_noises(site.of(dropout)):
            strips |= _strips_at(
                site, dropout, site.of(values), key, range(start, start + steps), row
            )
    return strips


def _strips_at(
    site: Site, dropout: RecurrentDropout, value: PyTree, key: jax.Array, steps: range, row: int
) -> Strips:
    """The strips of a site: variational masks are one column again and again."""

    def draw(step: jax.Array) -> PyTree:
        return draw_site(site, dropout, value, step_rng(key, step), at_step=True)

    once = draw_site(site, dropout, value, key)
    # Under lax.map, for JAX's rbg gives all rows of a vmap the bits of the first key.
    fresh = jax.lax.map(draw, jnp.arange(steps.start, steps.stop, dtype=jnp.uint32))
    strips: Strips = {}
    for index, (path, leaf) in enumerate(tree_leaves_with_path(value)):
        mask, masks = _leaf_of(once, index), _leaf_of(fresh, index)
        if mask is not None:
            masks = jnp.broadcast_to(mask, (len(steps), *np.shape(mask)))
        if masks is not None:
            shape = (len(steps), *np.shape(leaf))
            whole = np.broadcast_to(_with_ndim(np.asarray(masks), len(shape)), shape)
            strips[f"{site}{keystr(path)}"] = _units(site, whole, row)
    return strips


def _leaf_of(masks: PyTree, index: int) -> Any:
    if masks is None:
        return None
    return jax.tree.leaves(masks, is_leaf=lambda mask: mask is None)[index]


def _with_ndim(masks: np.ndarray, ndim: int) -> np.ndarray:
    """Puts the axes in that broadcasting puts in, behind time."""
    return masks.reshape(masks.shape[:1] + (1,) * (ndim - masks.ndim) + masks.shape[1:])


def _units(site: Site, masks: np.ndarray, row: int) -> np.ndarray:
    """One row's units over time; all of a weight's, for rows share it."""
    steps, units = len(masks), masks.shape[-1] if masks.ndim > 1 else 1
    if site == PARAMS:
        return masks.reshape(steps, -1).T
    rows = masks.reshape(steps, -1, units)
    if not 0 <= row < rows.shape[1]:
        raise ValueError(f"row must be one of the {rows.shape[1]} rows at {site}, got {row}.")
    return rows[:, row].T
