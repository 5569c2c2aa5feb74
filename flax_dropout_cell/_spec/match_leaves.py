"""Noises and masks, matched with the leaves of the value that they are for."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from ..noises.protocol import Noise, check_noise, is_array, mask_kind, needs_previous
from .prefixes import PyTree, broadcasts, dtype_of, is_deferred, structure_str, zip_prefix
from .recurrent_dropout import PARAMS, STATE, Masks, RecurrentDropout, Site, active_noises


class Leaf(NamedTuple):
    """One array at a site, its noise, and the mask that the caller gives for it."""

    path: str
    value: Any
    noise: Noise | None
    mask: jax.Array | None


def match_leaves(
    site: Site, dropout: RecurrentDropout, masks: Masks | None, value: PyTree
) -> tuple[list[Leaf], Any]:
    """Matches a site's noises and masks with the leaves of its value."""
    keyed, structure = tree_flatten_with_path(value)
    noises = _spread_noises(site, site.of(dropout), value)
    found = _spread_masks(site, None if masks is None else site.of(masks), value)
    leaves = []
    for (path, leaf), noise, mask in zip(keyed, noises, found, strict=True):
        name = f"{site}{keystr(path)}"
        if noise is not None and not _can_be_disturbed(site, name, leaf, noise):
            noise = None
        if mask is not None:
            _check_mask(site, name, mask, leaf, noise)
        leaves.append(Leaf(name, leaf, noise, mask))
    if (
        site == PARAMS
        and active_noises(site.of(dropout))
        and all(leaf.noise is None for leaf in leaves)
    ):
        raise ValueError(
            "dropout.params has noise, but no weights came for it: pass them as params."
            " Weights that the cell closes over are out of reach."
        )
    return leaves, structure


def _spread_noises(site: Site, prefix: PyTree, value: PyTree) -> list[Noise | None]:
    if is_deferred(prefix):
        prefix = prefix.resolve(value)
    spread: list[Noise | None] = []
    for noise, subtree in zip_prefix(f"dropout.{site}", prefix, value):
        if noise is not None:
            check_noise(f"dropout.{site}", noise)
        spread += [noise] * len(jax.tree.leaves(subtree))
    return spread


def _can_be_disturbed(site: Site, name: str, leaf: Any, noise: Noise) -> bool:
    if not is_array(leaf) and not isinstance(leaf, bool | int | float | complex | np.number):
        return False  # an activation function among the weights, say
    dtype = dtype_of(leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"{name} is {dtype}{list(np.shape(leaf))}, but noise needs floating-point values: "
            f"write .astype(jnp.float32), or give dropout.{site} a structure with None there."
        )
    # Here for the sites around a cell; inside one, only the call of `disturb` shows it.
    if needs_previous(noise) and not (site.inside or site == STATE):
        raise ValueError(
            f"dropout.{site}: {type(noise).__name__} needs the value of the step before, and "
            f"{site} has none. Put it at state, or inside a cell at a site that passes its "
            f"previous value: memory and hidden in this library's cells."
        )
    return True


def _spread_masks(site: Site, masks: PyTree, value: PyTree) -> list[jax.Array | None]:
    found: list[jax.Array | None] = []
    for mask, subtree in zip_prefix(f"masks.{site}", masks, value):
        # Unlike a noise, one mask cannot stand for several leaves: each draws its own.
        if mask is not None and not jax.tree_util.all_leaves([subtree]):
            wanted = structure_str(subtree)
            raise ValueError(f"masks.{site} has one mask for {wanted}; give each leaf its own.")
        found += [mask] * len(jax.tree.leaves(subtree))
    return found


def _check_mask(site: Site, name: str, mask: Any, leaf: Any, noise: Noise | None) -> None:
    if noise is None:
        raise ValueError(f"masks.{name} has a mask where dropout.{site} has no noise.")
    if not broadcasts(np.shape(mask), np.shape(leaf)):
        raise ValueError(
            f"masks.{name} has shape {np.shape(mask)}, which does not broadcast to the value's "
            f"shape {np.shape(leaf)}."
        )
    kind, dtype = mask_kind(noise), dtype_of(mask)
    # Cast to bool, deviates would all be True; masks of Dropout would count as noise of 0 and 1.
    if kind is not None and not jnp.issubdtype(dtype, kind):
        wanted = "boolean (write mask != 0)" if kind is jnp.bool_ else "floating-point"
        raise TypeError(
            f"masks.{name} is {dtype}{list(np.shape(mask))}, but a mask of {type(noise).__name__} "
            f"is {wanted}."
        )
