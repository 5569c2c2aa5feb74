"""`dropout_cell`: one step of a cell under dropout."""

import jax

from .._random.keys import as_rng, step_rng
from .._spec.recurrent_dropout import (
    INPUT,
    OUTPUT,
    PARAMS,
    STATE,
    Masks,
    PyTree,
    RecurrentDropout,
)
from .apply_noise import StepNoise
from .call_cell import Cell, call_cell
from .checks import as_sequence_ids, as_spec, check_masks, check_step


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

    The order of a step: noise on the params and the input; the cell, on the unchanged incoming
    carry, with noise at its sites inside; noise on the outgoing carry; noise on the output. A leaf
    with a mask in `masks` uses that mask. Without one, a per-step noise draws a mask from `rng`,
    and a variational noise is an error: `draw_masks` draws its mask once per sequence, before the
    loop.

    Args:
      params: the cell's weights.
      carry: the incoming carry.
      x: the input at this step.
      rng: the sequence's key, if `step` is given: the masks are then those of `dropout_scan` at
        that step. Without `step`, this step's own key, one of `jax.random.split(rng, T)`. If both
        `rng` and `masks` are None, this is evaluation: every site gives its expected value. If
        only `rng` is None, the masks are applied and nothing is drawn.
      cell: `cell(params, carry, x) -> (carry, y)`; it takes `disturb=` as well if it has sites
        of its own.
      dropout: the noise at each site.
      masks: the masks that are already drawn, by `draw_masks`.
      step: the index of this step in its sequence, an int or a traced int.
      sequence_ids: ints `[*batch]`. A row's masks then depend on its id, not on its place.

    Returns:
      `(carry, y)`, with the dtypes that the cell gives them.

    Raises:
      ValueError: if a mask is missing, or the structure or shape of a mask or noise does not fit.
      TypeError: if there is noise on values that are not floating-point, or an argument has the
        wrong type.

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
    dropout = as_spec(dropout, carry, cell)
    check_masks(masks, dropout)
    rng = as_rng(rng)
    if step is not None:
        check_step("step", step)
        rng = None if rng is None else step_rng(rng, step)
    step_noise = StepNoise(dropout, masks, rng, as_sequence_ids(sequence_ids))
    return run_step(step_noise(PARAMS, params), carry, x, cell, step_noise)


def run_step(
    params: PyTree,
    carry: PyTree,
    x: PyTree,
    cell: Cell,
    step_noise: StepNoise,
    *,
    scanned: bool = False,
) -> tuple[PyTree, PyTree]:
    """One step with weights that already have their noise; see `call_cell` for `scanned`."""
    x = step_noise(INPUT, x)
    # The incoming carry is not disturbed: the noise of the step before is in it already.
    new_carry, y = call_cell(cell, params, carry, x, step_noise.disturb_fn(), scanned=scanned)
    return step_noise(STATE, new_carry, carry), step_noise(OUTPUT, y)
