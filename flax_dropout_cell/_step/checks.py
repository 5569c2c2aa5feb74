"""Checks of arguments that several functions share."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._arguments import as_ints
from .._messages import must_be
from .._spec.recurrent_dropout import Masks, PyTree, RecurrentDropout, sites_of
from .._spec.state_noise import resolve_state_noise
from ..cells.known import family_of
from .sequence_ids import SequenceIds, split_words


def check_dropout(dropout: Any) -> None:
    """Raises if `dropout` is not a `RecurrentDropout`."""
    if not isinstance(dropout, RecurrentDropout):
        wanted = "a RecurrentDropout, such as RecurrentDropout(input=Dropout(keep_prob=0.8))"
        raise TypeError(must_be("dropout", wanted, dropout))


def as_spec(dropout: Any, carry: PyTree, cell: Any) -> RecurrentDropout:
    """The spec, checked, with one noise for a whole state resolved for the cell's carry."""
    check_dropout(dropout)
    return resolve_state_noise(dropout, carry, family_of(cell))


def check_masks(masks: Any, dropout: RecurrentDropout) -> None:
    """Raises if `masks` is neither `Masks` nor None, or has a mask for a site without noise."""
    if masks is None:
        return
    if not isinstance(masks, Masks):
        raise TypeError(must_be("masks", "Masks, as draw_masks gives them", masks))
    if not isinstance(masks.inside, Mapping | None):
        raise TypeError(must_be("masks.inside", "a dict of masks by site, or None", masks.inside))
    for site in sites_of(masks):
        # Around the cell, `match_leaves` raises. Inside one without this site, it would be said
        # that dropout has noise there.
        if site.inside and jax.tree.leaves(site.of(masks)) and site.of(dropout) is None:
            raise ValueError(f"masks.{site} has a mask where dropout.{site} has no noise.")


def check_step(name: str, step: Any) -> None:
    """Raises if `step` is not the index of a step."""
    # jnp.result_type takes the names of dtypes too.
    if isinstance(step, bool | str | type | list | tuple | None) or not jnp.issubdtype(
        jnp.result_type(step), jnp.integer
    ):
        raise TypeError(must_be(name, "an int", step))
    if np.shape(step) != ():
        raise ValueError(f"{name} must be a scalar, got shape {np.shape(step)}.")
    # Sites have the keys from 2**31 on. Traced steps are trusted.
    if isinstance(step, int | np.integer | np.ndarray) and not 0 <= step < 2**31:
        raise ValueError(f"{name} must be at least 0 and below 2**31, got {step}.")


def check_start(start: Any, steps: int) -> None:
    """Raises if a scan of `steps` steps cannot begin at `start`."""
    check_step("start", start)
    is_known = isinstance(start, int | np.integer | np.ndarray) and isinstance(steps, int)
    if is_known and start + steps > 2**31:
        raise ValueError(f"start + time must be at most 2**31, got {start} + {steps}.")


def as_sequence_ids(sequence_ids: Any) -> SequenceIds | None:
    """The rows' ids, checked; None if they have none."""
    return None if sequence_ids is None else split_words(as_ints("sequence_ids", sequence_ids))
