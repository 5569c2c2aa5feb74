"""`plot_masks`: a picture of which units a spec keeps and drops over time."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from .._arguments import check_count
from .._random.keys import need_rng
from .._sequence.dropout_scan import at_a_step, count_steps
from .._sequence.step_masks import draw_all_steps
from .._spec.match_leaves import match_leaves
from .._spec.recurrent_dropout import (
    PARAMS,
    Masks,
    PyTree,
    RecurrentDropout,
    Site,
    active_noises,
    sites_of,
)
from .._step.call_cell import Cell
from .._step.checks import as_spec, check_start
from .._step.draw_masks import draw_sites, site_values
from ..noises.protocol import Noise, needs_previous
from .describe import noise_str

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Strip(NamedTuple):
    """The masks of one array over time.

    Attributes:
      mask: `[units, time]`, for one row of the batch.
      noise: the noise there.
      axis: the name of the first axis of `mask`.
    """

    mask: np.ndarray
    noise: Noise
    axis: str


Strips = dict[str, Strip]


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
    ax: "Axes | Sequence[Axes] | None" = None,
) -> "Figure":
    """Plots the masks of one row of a batch over time, a strip for each array that has noise.

    The masks are those of `dropout_scan` with the same arguments. A variational mask is constant
    along the time axis; a per-step mask changes from step to step. Each strip names its noise.
    Boolean masks have two colors, which the label explains; other masks, such as those of Gaussian
    noise, have a color bar. Needs matplotlib: `pip install matplotlib`.

    Args:
      params: the cell's weights. Only the shapes of `params`, `carry` and `xs` are used.
      carry: a carry.
      xs: the inputs, a pytree of arrays `[time, *batch, ...]`.
      rng: the sequence's key.
      cell: `cell(params, carry, x) -> (carry, y)`; it is traced, not run.
      dropout: the noise at each site.
      start: the absolute index of the first step.
      row: which row of the batch, counted through all dims of the inputs but the last.
      max_units: how many units of each array are shown.
      ax: the matplotlib axes to draw in, one for each array; a new figure by default.

    Returns:
      A matplotlib figure.

    Raises:
      ImportError: if matplotlib is not installed.
      ValueError: if no noise draws a mask, or as in `dropout_scan`.
      TypeError: as in `dropout_scan`.

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
      ['input: Dropout(keep_prob=0.5)', 'output: Dropout(keep_prob=0.5)']
    """
    strips = draw_strips(params, carry, xs, rng, cell=cell, dropout=dropout, start=start, row=row)
    return plot_strips(strips, start=start, max_units=max_units, ax=ax)


def plot_strips(
    strips: Strips, *, start: int, max_units: int, ax: "Axes | Sequence[Axes] | None"
) -> "Figure":
    """Plots strips below each other, in a new figure or in the axes given."""
    # matplotlib is an extra: only this function needs it.
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ImportError("plot_masks needs matplotlib: pip install matplotlib.") from None
    max_units = check_count("max_units", max_units)
    if not strips:
        raise ValueError("dropout has no noise that draws, so there are no masks to plot.")
    figure = _figure(strips, max_units) if ax is None else None
    grid = np.ravel(figure.axes if figure is not None else ax)
    if len(grid) != len(strips):
        wanted = f"one axes for each array with masks, {', '.join(strips)}"
        raise ValueError(f"ax must have {wanted}; got {len(grid)}.")
    for axes, (path, strip) in zip(grid, strips.items(), strict=True):
        _draw(axes, path, strip, start, max_units)
    grid[-1].set_xlabel("step")
    return grid[-1].figure


def _figure(strips: Strips, max_units: int) -> "Figure":
    from matplotlib.figure import Figure

    heights = [len(strip.mask[:max_units]) for strip in strips.values()]
    # Not pyplot, which would keep the figure alive and may open a window.
    figure = Figure(
        figsize=(7, 0.6 + 0.4 * len(strips) + 0.04 * sum(heights)), layout="constrained"
    )
    figure.subplots(len(strips), sharex=True, squeeze=False, height_ratios=heights)
    return figure


def _draw(axes: "Axes", path: str, strip: Strip, start: int, max_units: int) -> None:
    """Draws one array's masks, and says what blue and blank, or the shades, stand for."""
    mask = strip.mask[:max_units]
    meaning = _meaning(strip)
    limits: dict[str, Any] = {"vmin": 0, "vmax": 1} if meaning else {}
    image = axes.imshow(
        mask,
        cmap="Blues",
        aspect="auto",
        interpolation="nearest",
        extent=(start - 0.5, start + mask.shape[1] - 0.5, len(mask) - 0.5, -0.5),
        **limits,
    )
    axes.set_title(f"{path}: {noise_str(strip.noise)}", loc="left", fontsize="medium")
    if meaning:
        axes.set_title(meaning, loc="right", fontsize="small")
    else:
        axes.figure.colorbar(image, ax=axes, label="mask")
    axes.set_ylabel(strip.axis)
    axes.set_yticks([])


def _meaning(strip: Strip) -> str | None:
    """The words for a mask of two values; None if it has shades."""
    if strip.mask.dtype != bool:
        return None
    if needs_previous(strip.noise):
        return "blue: new value, blank: held back"
    return "blue: kept, blank: dropped"


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
    batch_ndim: int | None = None,
) -> Strips:
    """The masks of one row over time, by the paths of the arrays that they disturb.

    Without `batch_ndim`, the batch is the dims that the inputs and the carry share.
    """
    dropout = as_spec(dropout, carry, cell)
    key = need_rng("plot_masks", rng)
    steps = count_steps(xs)
    check_start(start, steps)
    x = at_a_step(xs)
    values = site_values(
        params, carry, x, cell, dropout, lambda prefix: bool(active_noises(prefix))
    )
    masks = {
        "once": draw_sites(dropout, values, key),
        "each step": draw_all_steps(dropout, values, key, steps, start, None),
    }
    batch_ndim = _batch_ndim(x, carry) if batch_ndim is None else batch_ndim
    strips: Strips = {}
    for site in sites_of(dropout):
        if active_noises(site.of(dropout)):
            strips |= _strips_at(site, dropout, site.of(values), masks, steps, row, batch_ndim)
    return strips


def _batch_ndim(x: PyTree, carry: PyTree) -> int:
    """The number of leading dims that the inputs and the carry share, without their last."""
    shapes = [np.shape(leaf)[:-1] for leaf in jax.tree.leaves((x, carry)) if np.ndim(leaf)]
    common = itertools.takewhile(lambda sizes: len(set(sizes)) == 1, zip(*shapes, strict=False))
    return len(list(common))


def _strips_at(
    site: Site,
    dropout: RecurrentDropout,
    value: PyTree,
    masks: dict[str, Masks],
    steps: int,
    row: int,
    batch_ndim: int,
) -> Strips:
    """The strips of a site: variational masks are one column again and again."""
    once, fresh = site.of(masks["once"]), site.of(masks["each step"])
    strips: Strips = {}
    noises = [leaf.noise for leaf in match_leaves(site, dropout, None, value)[0]]
    for index, (path, leaf) in enumerate(tree_leaves_with_path(value)):
        mask, drawn = _leaf_of(once, index), _leaf_of(fresh, index)
        if mask is not None:
            drawn = jnp.broadcast_to(mask, (steps, *np.shape(mask)))
        noise = noises[index]
        if drawn is not None and noise is not None:
            shape = (steps, *np.shape(leaf))
            whole = np.broadcast_to(_with_ndim(np.asarray(drawn), len(shape)), shape)
            if np.iscomplexobj(whole):
                whole = np.real(whole)  # a picture has one number for each unit
            axis = f"weight {list(np.shape(leaf))}" if site == PARAMS else "unit"
            strip = Strip(_units(site, whole, row, batch_ndim), noise, axis)
            strips[f"{site}{keystr(path)}"] = strip
    return strips


def _leaf_of(masks: PyTree, index: int) -> Any:
    if masks is None:
        return None
    return jax.tree.leaves(masks, is_leaf=lambda mask: mask is None)[index]


def _with_ndim(masks: np.ndarray, ndim: int) -> np.ndarray:
    """Inserts the axes that broadcasting would add, after time."""
    return masks.reshape(masks.shape[:1] + (1,) * (ndim - masks.ndim) + masks.shape[1:])


def _units(site: Site, masks: np.ndarray, row: int, batch_ndim: int) -> np.ndarray:
    """One row's units over time; for a weight, which rows share, all of its units."""
    steps, (batch, rest) = len(masks), np.split(masks.shape[1:], [batch_ndim])
    if site == PARAMS:
        return masks.reshape(steps, -1).T
    rows = masks.reshape(steps, int(np.prod(batch)), int(np.prod(rest)))
    if not 0 <= row < rows.shape[1]:
        raise ValueError(f"row must be one of the {rows.shape[1]} rows at {site}, got {row}.")
    return rows[:, row].T
