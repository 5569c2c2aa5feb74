"""One step of a cell under dropout, and the masks that a whole sequence shares."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._disturb import Disturbance, draw_site, inside_names
from ._inside import Cell, call_cell, trace_cell
from ._leaky import family_of, place_state
from ._random.keys import as_rng, step_rng
from ._rows import Rows, rows_by_id
from ._shown import shown
from ._sites import (
    INPUT,
    OUTPUT,
    PARAMS,
    STATE,
    Masks,
    PyTree,
    RecurrentDropout,
    Site,
    draws_once,
    make_masks,
    sites_of,
)


def dropout_cell(
    params: PyTree,
    carry: PyTree,
    x: PyTree,
    rng: jax.Array | None,
    *,
    cell: Cell,
    dropout: RecurrentDropout,
    masks: Masks | None = None,
    step: int | jax.Array | None = None,
    sequence_ids: jax.typing.ArrayLike | None = None,
) -> tuple[PyTree, PyTree]:
    """Runs one step of `cell` under dropout.

    Noise goes on the params and the input, then the cell runs on the untouched incoming carry,
    with noise at the sites that it has inside, then noise goes on the outgoing carry, then on the
    output. A leaf that has a mask in `masks` uses it. Any other leaf draws one from `rng` if its
    noise is per-step, while a variational noise must have its mask: it is drawn once per sequence,
    before the loop, by `draw_masks`.

    Args:
      params: the cell's weights.
      carry: the incoming carry.
      x: the input at this step.
      rng: the sequence's key, where `step` is given: the masks are then those of `dropout_scan`
        at that step. Without `step`, this step's own key, one of `jax.random.split(rng, T)`. None
        with `masks=None` is evaluation: every site gives its expected value. None with masks
        applies these and draws nothing.
      cell: `cell(params, carry, x) -> (carry, y)`; it takes `disturb=` as well if it has sites
        of its own.
      dropout: which noise sits where.
      masks: the masks that are already drawn.
      step: the index of this step in its sequence, an int or a traced int.
      sequence_ids: ints `[*batch]`. Each row then draws by its id instead of by its place.

    Returns:
      `(carry, y)`, with the dtypes that the cell gives them.

    Raises:
      ValueError: a mask is missing, or a mask's or noise's structure or shape does not fit.
      TypeError: noise on values that are not floating-point, or an argument of a wrong type.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> def cell(params, h, x):
      ...     h = jnp.tanh(x @ params["in"] + h @ params["rec"])
      ...     return h, h
      >>> params = {"in": jnp.ones((3, 8)), "rec": jnp.ones((8, 8))}
      >>> spec = fdc.RecurrentDropout(state=fdc.Dropout(keep_prob=0.8))
      >>> h, y = fdc.dropout_cell(
      ...     params, jnp.zeros((4, 8)), jnp.ones((4, 3)), jax.random.key(0), step=0,
      ...     cell=cell, dropout=spec,
      ... )
      >>> h.shape, y.shape
      ((4, 8), (4, 8))
    """
    check_dropout(dropout)
    check_masks(masks, dropout)
    rng = as_rng(rng)
    if step is not None:
        check_step("step", step)
        rng = None if rng is None else step_rng(rng, step)
    dropout = place_state(dropout, carry, family_of(cell))
    disturbance = Disturbance(dropout, masks, rng, as_rows(sequence_ids))
    return run_step(disturbance(PARAMS, params), carry, x, cell, disturbance)


def run_step(
    params: PyTree,
    carry: PyTree,
    x: PyTree,
    cell: Cell,
    disturbance: Disturbance,
    *,
    scanned: bool = False,
) -> tuple[PyTree, PyTree]:
    """One step on weights that are disturbed already; `scanned`, its carry stays as it was."""
    x = disturbance(INPUT, x)
    new_carry, y = call_cell(cell, params, carry, x, disturbance.sites(), scanned=scanned)
    return disturbance(STATE, new_carry, carry), disturbance(OUTPUT, y)


def draw_masks(
    params: PyTree,
    carry: PyTree,
    x: PyTree,
    rng: jax.Array,
    *,
    cell: Cell,
    dropout: RecurrentDropout,
    sequence_ids: jax.typing.ArrayLike | None = None,
) -> Masks:
    """Draws the masks of the variational noises, for one sequence.

    Call it before the loop, once per sequence, and hand the result to every `dropout_cell` of
    that sequence (Gal and Ghahramani 2016, arXiv:1512.05287, section 4). Each mask depends on
    `rng`, its site, its leaf and the noise there.

    Args:
      params: the cell's weights.
      carry: a carry. Of this, `params` and `x` only shapes and dtypes are used, so a
        `jax.ShapeDtypeStruct` of each does as well.
      x: the input at one step, without the time axis.
      rng: the sequence's key.
      cell: `cell(params, carry, x) -> (carry, y)`; never run, only traced for the shapes of its
        output and of its sites inside.
      dropout: which noise sits where.
      sequence_ids: ints `[*batch]`. Each row then draws by its id instead of by its place.

    Returns:
      `Masks` with the variational leaves filled in, None elsewhere.

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
    check_dropout(dropout)
    key = as_rng(rng)
    if key is None:
        raise ValueError("draw_masks needs a key such as jax.random.key(0), got rng=None.")
    dropout = place_state(dropout, carry, family_of(cell))
    rows = as_rows(sequence_ids)
    values = site_values(params, carry, x, cell, dropout)
    return draw_sites(dropout, values, key, rows)


def site_values(
    params: PyTree, carry: PyTree, x: PyTree, cell: Cell, dropout: RecurrentDropout
) -> Masks:
    """The value at each site, or its shapes and dtypes, as far as variational masks need them."""
    y, inside = None, {}
    if draws_once(dropout.output) or draws_once(dropout.inside):
        y, inside = trace_cell(cell, params, carry, x, inside_names(dropout))
    return Masks(params, x, carry, y, inside)


def draw_sites(
    dropout: RecurrentDropout,
    values: Masks,
    rng: jax.Array,
    rows: Rows | None = None,
    *,
    rows_alone: bool = False,
) -> Masks:
    """Draws the variational masks for `values`: each site's value, or its shapes and dtypes."""

    def draw(site: Site) -> PyTree:
        return draw_site(site, dropout, site.of(values), rng, rows, rows_alone=rows_alone)

    with jax.named_scope("draw_masks"):
        return make_masks({site: draw(site) for site in sites_of(values)})


def check_dropout(dropout: Any) -> None:
    """Refuses what is no `RecurrentDropout`."""
    if not isinstance(dropout, RecurrentDropout):
        raise TypeError(
            f"dropout must be a RecurrentDropout, such as "
            f"RecurrentDropout(input=Dropout(keep_prob=0.8)), got {shown(dropout)}."
        )


def check_masks(masks: Any, dropout: RecurrentDropout) -> None:
    """Refuses what is neither `Masks` nor None, and masks for a site that has no noise."""
    if masks is None:
        return
    if not isinstance(masks, Masks):
        raise TypeError(f"masks must be Masks, as draw_masks gives them, got {shown(masks)}.")
    for site in sites_of(masks):
        if site.inside and jax.tree.leaves(site.of(masks)) and site.of(dropout) is None:
            raise ValueError(f"masks.{site} has a mask where dropout.{site} has no noise.")


def check_step(name: str, step: Any) -> None:
    """Refuses what is no step index."""
    if isinstance(step, bool) or not jnp.issubdtype(jnp.result_type(step), jnp.integer):
        raise TypeError(f"{name} must be an int, got {shown(step)}.")
    if np.shape(step) != ():
        raise ValueError(f"{name} must be a scalar, got shape {np.shape(step)}.")
    if isinstance(step, int | np.integer) and not 0 <= step < 2**31:
        raise ValueError(f"{name} must be at least 0 and below 2**31, got {step}.")


def as_rows(sequence_ids: Any) -> Rows | None:
    """Checks the ids that rows draw by."""
    return None if sequence_ids is None else rows_by_id(check_ids(sequence_ids))


def check_ids(sequence_ids: Any) -> jax.Array:
    """Refuses ids that are no ints."""
    sequence_ids = jnp.asarray(sequence_ids)
    if not jnp.issubdtype(sequence_ids.dtype, jnp.integer):
        raise TypeError(f"sequence_ids must be ints, got {sequence_ids.dtype}.")
    return sequence_ids
