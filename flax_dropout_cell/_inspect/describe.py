"""`describe`: a table of the noise that a spec applies to a cell."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._hoist.scan import ScanExplanation, explain_traced, say_plain
from .._hoist.traced_scan import trace_scan
from .._sequence.step_masks import draw_ahead
from .._spec.match_leaves import match_leaves
from .._spec.prefixes import dtype_of, shape_of
from .._spec.recurrent_dropout import (
    PARAMS,
    PyTree,
    RecurrentDropout,
    Site,
    SiteValues,
    active_noises,
    draws_at_each_step,
    draws_once,
    fill_in,
    sites_of,
)
from .._step.call_cell import Cell, eval_shape, sites_of_cell, trace_cell
from .._step.checks import as_spec
from .._step.draw_masks import IsDrawn, draw_masks, draw_site, inside_names, site_values
from .._step.dropout_cell import dropout_cell
from ..noises.protocol import Noise, is_array, needs_previous

_HEAD = ("site", "value", "noise", "drawn", "mask", "shared over")
_LISTED = 4  # more undisturbed leaves than this at one site are counted, not listed


_LINEAR = "a linear recurrence: no loop on a GPU or TPU, or with parallel=True"
_EVALUATES = "evaluation: nothing is drawn"
_UNZONED = "the output comes before the noise at state: it is the new h, without zoneout"


class Place(NamedTuple):
    """One array that has noise.

    Attributes:
      path: its site, and the leaf there, such as `state[1]`.
      value: its shape and dtype at a step.
      noise: the noise.
      mask: the shape and dtype of its mask.
      shared_over: the axes that share one mask: `"steps"`, `"rows"` for a weight, and those that
        the mask lacks.
    """

    path: str
    value: jax.ShapeDtypeStruct
    noise: Noise
    mask: jax.ShapeDtypeStruct
    shared_over: tuple[str, ...]


@dataclasses.dataclass(frozen=True, repr=False)
class Description:
    """The noise that a spec applies to a cell; it prints as a table.

    Attributes:
      places: the arrays that have noise.
      undisturbed: the arrays around the cell that have none.
      free_sites: the sites inside the cell that have none.
      why_plain: why `dropout_scan` runs the cell and its noise in `jax.lax.scan` as they are, or
        None. See `explain_scan`.
      before: the equations of both that run before the loop, for all steps at once.
      after: those that run after it.
      is_linear: whether the carry is a linear recurrence, with its noise.
      evaluates: whether the layer or wrapper is set to evaluation, in which nothing is drawn.
    """

    places: tuple[Place, ...]
    undisturbed: tuple[str, ...]
    free_sites: tuple[str, ...]
    why_plain: str | None = None
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    is_linear: bool = False
    evaluates: bool = False

    def __repr__(self) -> str:
        lines = [
            *_aligned([_HEAD, *map(_table_row, self.places)]),
            f"without noise: {', '.join(self.undisturbed) or 'nothing'}",
            f"free sites inside the cell: {', '.join(self.free_sites) or 'none'}",
            *(_UNZONED for place in self.places if _is_zoned_h(place)),
        ]
        if self.why_plain is not None:
            lines.append(say_plain(self.why_plain))
        if self.before:
            lines.append(f"before the loop: {', '.join(self.before)}")
        if self.after:
            lines.append(f"after the loop: {', '.join(self.after)}")
        if self.is_linear:
            lines.append(_LINEAR)
        if self.evaluates:
            lines.append(_EVALUATES)
        return "\n".join(lines)


def describe(
    params: PyTree, carry: PyTree, x: PyTree, *, cell: Cell, dropout: RecurrentDropout
) -> Description:
    """Describes the noise in a cell: a table of places, noises and masks.

    The cell is only traced, and nothing is drawn, so each argument may be a
    `jax.ShapeDtypeStruct`. Layers have a method for this, `layer.describe(inputs)`.

    Args:
      params: the cell's weights.
      carry: a carry.
      x: the input at one step, without the time axis.
      cell: `cell(params, carry, x) -> (carry, y)`.
      dropout: the noise at each site.

    Returns:
      A `Description`, which prints as a table.

    Raises:
      ValueError: as in `draw_masks` and `dropout_cell`.
      TypeError: as in `draw_masks` and `dropout_cell`.

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
      without noise: params (3 leaves), state.c, output
      free sites inside the cell: candidate, hidden, input_per_gate, memory, recurrent,
      recurrent_per_gate
    """
    dropout = as_spec(dropout, carry, cell)
    y, inside = trace_cell(cell, params, carry, x, inside_names(dropout))
    values = SiteValues(params=params, input=x, state=carry, output=y, inside=inside)
    places: list[Place] = []
    undisturbed: list[str] = []
    for site in sites_of(dropout):
        disturbed, others = _places_at(site, dropout, site.of(values))
        places += disturbed
        undisturbed += others
    # A second trace, in which no site has noise: the cell names all of its sites in it.
    free = set(sites_of_cell(cell, params, carry, x)).difference(inside)
    scan = _explain(params, carry, x, cell, dropout)
    return Description(
        tuple(places),
        tuple(undisturbed),
        tuple(sorted(free)),
        scan.why_plain,
        scan.before,
        scan.after,
        scan.obstacle is None,
    )


def _explain(
    params: PyTree, carry: PyTree, x: PyTree, cell: Cell, dropout: RecurrentDropout
) -> ScanExplanation:
    """Explains the scan over a cell with its noise; a long one may draw more masks in the loop."""
    options: dict[str, Any] = {"cell": cell, "dropout": dropout}
    explained: list[ScanExplanation] = []

    def run(params: PyTree, carry: PyTree, x: PyTree) -> None:
        rng = jax.random.key(0)  # any key will do: nothing is drawn
        once = draw_masks(params, carry, x, rng, **options)
        values_of = functools.partial(site_values, params, carry, x, cell)
        ahead = draw_ahead(values_of, rng, 1, dropout=dropout, start=0, ids=None)

        def step(carry: PyTree, at: Any) -> tuple[PyTree, PyTree]:
            index, x, of_step = at
            masks = once if of_step is None else fill_in(once, of_step)
            new_carry, y = dropout_cell(params, carry, x, rng, step=index, masks=masks, **options)
            _check_one_step(carry, new_carry)
            return new_carry, y

        xs = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], x)
        at = jnp.zeros(1, jnp.uint32), xs, ahead
        explained.append(explain_traced(trace_scan(step, carry, at), carry))

    eval_shape(run, params, carry, x)
    return explained[0]


def _check_one_step(carry: PyTree, new_carry: PyTree) -> None:
    """Raises if the cell gave a carry of another shape, as with a whole sequence in place of x."""
    for old, new in zip(jax.tree.leaves(carry), jax.tree.leaves(new_carry), strict=True):
        if np.shape(old) != np.shape(new):
            raise ValueError(
                f"the cell turned a carry of shape {np.shape(old)} into one of {np.shape(new)}: x "
                f"must be the input of one step (xs[0], or x[:, 0] of a layer's inputs), and the "
                f"carry must have its batch dims."
            )


def _places_at(
    site: Site, dropout: RecurrentDropout, value: PyTree
) -> tuple[list[Place], list[str]]:
    """The places with noise at a site, and the paths of the other leaves."""
    if site.inside and not active_noises(site.of(dropout)):
        return [], []
    leaves, _ = match_leaves(site, dropout, None, value)
    kinds = (draws_once, draws_at_each_step)
    masks = [_mask_shapes(site, dropout, value, is_drawn) for is_drawn in kinds]
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
    site: Site, dropout: RecurrentDropout, value: PyTree, is_drawn: IsDrawn
) -> list[jax.ShapeDtypeStruct | None]:
    """The shapes of the masks that are drawn for each leaf of a site."""

    def draw(rng: jax.Array) -> PyTree:
        return draw_site(site, dropout, value, rng, is_drawn=is_drawn)

    masks = jax.eval_shape(draw, jax.random.key(0))  # any key will do: nothing is drawn
    if masks is None:
        return [None] * len(jax.tree.leaves(value))
    # None may be a leaf without a mask, or a part of the value's structure.
    return jax.tree.structure(value).flatten_up_to(masks)


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


def _is_zoned_h(place: Place) -> bool:
    """Whether a carry of one array, such as a GRU's h, keeps old values that the output lacks."""
    return place.path == "state" and needs_previous(place.noise)


def _table_row(place: Place) -> tuple[str, ...]:
    drawn = "once" if place.noise.variational else "each step"
    shapes = (_type(place.value), _type(place.mask))
    shared = ", ".join(place.shared_over)
    return (place.path, shapes[0], noise_str(place.noise), drawn, shapes[1], shared)


def _type(value: Any) -> str:
    return f"{dtype_of(value)}{list(np.shape(value))}"


def noise_str(noise: Noise) -> str:
    """A noise as written in code, without defaults and without facts that have their own column."""
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
