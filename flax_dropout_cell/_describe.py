"""`describe`: a table of what a spec does to a cell."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from ._disturb import draw_site, inside_names
from ._inside import Cell, sites_of_cell, trace_cell
from ._leaky import family_of, place_state
from ._sites import PARAMS, Masks, PyTree, RecurrentDropout, Site, active_noises, line_up, sites_of
from ._step import check_dropout
from ._trees import dtype_of, shape_of
from .noises.protocol import Noise, is_array

_HEAD = ("site", "value", "noise", "drawn", "mask", "shared over")
_LISTED = 4  # more undisturbed leaves than this at one site are counted, not listed


class Place(NamedTuple):
    """One array that noise disturbs.

    Attributes:
      path: its site, and the leaf there, such as `state[1]`.
      value: its shape and dtype at a step.
      noise: what disturbs it.
      mask: the shape and dtype of its mask.
      shared_over: what one mask is shared over: `"steps"`, `"rows"` for a weight's mask, and the
        axes that the mask does not have.
    """

    path: str
    value: jax.ShapeDtypeStruct
    noise: Noise
    mask: jax.ShapeDtypeStruct
    shared_over: tuple[str, ...]


@dataclasses.dataclass(frozen=True, repr=False)
class Description:
    """What a spec does to a cell; it prints as a table.

    Attributes:
      places: the arrays that noise disturbs.
      undisturbed: what it leaves alone around the cell.
      free_sites: the sites inside the cell that have no noise.
    """

    places: tuple[Place, ...]
    undisturbed: tuple[str, ...]
    free_sites: tuple[str, ...]

    def __repr__(self) -> str:
        return "\n".join(
            [
                *_aligned([_HEAD, *map(_cells, self.places)]),
                f"not disturbed: {', '.join(self.undisturbed) or 'nothing'}",
                f"free sites inside the cell: {', '.join(self.free_sites) or 'none'}",
            ]
        )


def describe(
    params: PyTree, carry: PyTree, x: PyTree, *, cell: Cell, dropout: RecurrentDropout
) -> Description:
    """Shows what a spec disturbs in a cell, as a table: where, by which noise, with which masks.

    Nothing is run or drawn, only traced, so a `jax.ShapeDtypeStruct` does as well as an array.
    Layers have it as `layer.describe(inputs)`.

    Args:
      params: the cell's weights.
      carry: a carry.
      x: the input at one step, without the time axis.
      cell: `cell(params, carry, x) -> (carry, y)`.
      dropout: which noise sits where.

    Returns:
      A `Description`, which prints as a table.

    Raises:
      ValueError: as `draw_masks`.
      TypeError: as `draw_masks`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> params = fdc.init_lstm(jax.random.key(0), 32, 64)
      >>> carry = fdc.LSTMState(jnp.zeros((4, 64)), jnp.zeros((4, 64)))
      >>> spec = fdc.RecurrentDropout(
      ...     input=fdc.Dropout(keep_prob=0.8, variational=True),
      ...     state=(None, fdc.Dropout(keep_prob=0.9)),
      ... )
      >>> fdc.describe(params, carry, jnp.ones((4, 32)), cell=fdc.lstm_cell, dropout=spec)
      site     value           noise                   drawn      mask         shared over
      input    float32[4, 32]  Dropout(keep_prob=0.8)  once       bool[4, 32]  steps
      state.h  float32[4, 64]  Dropout(keep_prob=0.9)  each step  bool[4, 64]
      not disturbed: params (3 leaves), state.c, output
      free sites inside the cell: candidate, hidden, input_per_gate, memory, recurrent,
      recurrent_per_gate
    """
    check_dropout(dropout)
    dropout = place_state(dropout, carry, family_of(cell))
    y, inside = trace_cell(cell, params, carry, x, inside_names(dropout))
    values = Masks(params, x, carry, y, inside)
    places: list[Place] = []
    undisturbed: list[str] = []
    for site in sites_of(dropout):
        disturbed, others = _look_at(site, dropout, site.of(values))
        places += disturbed
        undisturbed += others
    free = set(sites_of_cell(cell, params, carry, x)).difference(inside)
    return Description(tuple(places), tuple(undisturbed), tuple(sorted(free)))


def _look_at(site: Site, dropout: RecurrentDropout, value: PyTree) -> tuple[list[Place], list[str]]:
    """What is disturbed at a site, and names for the rest."""
    if site.inside and not active_noises(site.of(dropout)):
        return [], []
    leaves, _ = line_up(site, dropout, None, value)
    masks = [_mask_shapes(site, dropout, value, at_step) for at_step in (False, True)]
    places, others = [], []
    for leaf, once, at_step in zip(leaves, *masks, strict=True):
        mask = at_step if once is None else once
        if leaf.noise is None or mask is None:
            others.append(leaf.path)
        else:
            shape = shape_of(leaf.value)
            shared = _shared_over(site, leaf.noise, shape.shape, mask.shape)
            places.append(Place(leaf.path, shape, leaf.noise, mask, shared))
    return places, _summed_up(site, others, len(leaves))


def _mask_shapes(
    site: Site, dropout: RecurrentDropout, value: PyTree, at_step: bool
) -> list[jax.ShapeDtypeStruct | None]:
    """The shapes of the masks that are drawn for each leaf of a site."""

    def draw(rng: jax.Array) -> PyTree:
        return draw_site(site, dropout, value, rng, at_step=at_step)

    masks = jax.eval_shape(draw, jax.random.key(0))
    if masks is None:
        return [None] * len(jax.tree.leaves(value))
    return jax.tree.leaves(masks, is_leaf=lambda mask: mask is None)


def _shared_over(
    site: Site, noise: Noise, value: tuple[int, ...], mask: tuple[int, ...]
) -> tuple[str, ...]:
    shared = ["steps"] if noise.variational else []
    if site == PARAMS:
        shared.append("rows")
    mask = (1,) * (len(value) - len(mask)) + mask
    pairs = enumerate(zip(value, mask, strict=True))
    return (*shared, *(f"axis {axis}" for axis, (size, drawn) in pairs if drawn < size))


def _summed_up(site: Site, others: list[str], leaves: int) -> list[str]:
    if len(others) == leaves and leaves > 1:
        return [f"{site} ({leaves} leaves)"]
    if len(others) > _LISTED:
        return [f"{site} ({len(others)} of {leaves} leaves)"]
    return others


def _cells(place: Place) -> tuple[str, ...]:
    drawn = "once" if place.noise.variational else "each step"
    shapes = (_type(place.value), _type(place.mask))
    shared = ", ".join(place.shared_over)
    return (place.path, shapes[0], _written(place.noise), drawn, shapes[1], shared)


def _type(value: Any) -> str:
    return f"{dtype_of(value)}{list(np.shape(value))}"


def _written(noise: Noise) -> str:
    """A noise as it is written, without its defaults and what has a column of its own."""
    if not dataclasses.is_dataclass(noise):
        return type(noise).__name__
    given = []
    for field in dataclasses.fields(noise):
        value = getattr(noise, field.name)
        if field.name in ("variational", "broadcast_dims"):
            continue
        if is_array(value):
            given.append(f"{field.name}={_type(value)}")
        elif value != field.default:
            given.append(f"{field.name}={value!r}")
    return f"{type(noise).__name__}({', '.join(given)})"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
