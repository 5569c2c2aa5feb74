"""Which noise sits where: the four sites of a cell, their noises and their masks."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from .noises.protocol import Noise, is_identity

PyTree = Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["input", "state", "output", "params"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentDropout:
    """The noises of a recurrent cell: what to disturb, and how.

    Each site takes a pytree prefix of noises, as `in_axes` is a prefix for `jax.vmap`: one noise
    for all leaves of the value there, `None` for none, or a structure of them. Each leaf has a
    mask of its own.

    Args:
      input: noises on what the cell reads at a step.
      state: noises on the carry that the cell returns. What a cell adds to at each step, an LSTM's
        memory c or a GRU's h, grows by `1 / keep_prob` at each step under dropout. For an LSTM,
        whose carry is `(c, h)`, write `state=(None, Dropout(0.8))`: here one noise means both,
        while the Flax wrappers, which know the cell, place it on h. For a GRU keep keep_prob
        near 1.
      output: noises on what the cell emits, independent of `state` even where it emits h.
      params: noises on the cell's weights (weight-drop: Merity et al. 2017, arXiv:1708.02182,
        section 2).

    Example:
      >>> import jax
      >>> import flax_dropout_cell as fdc
      >>> spec = fdc.RecurrentDropout(
      ...     input=fdc.Dropout(0.9, variational=True), state=(None, fdc.Dropout(0.8))
      ... )
      >>> jax.tree.leaves(spec)
      [0.9, 0.8]
    """

    input: PyTree = None
    state: PyTree = None
    output: PyTree = None
    params: PyTree = None


class Masks(NamedTuple):
    """Drawn masks, a field for each site.

    A field is `None`, or a tree shaped like the value there that holds, for each leaf, a mask
    that broadcasts to it or `None`.
    """

    params: PyTree = None
    input: PyTree = None
    state: PyTree = None
    output: PyTree = None


SITES = Masks._fields


def draws_once(prefix: PyTree) -> bool:
    """Whether anything in a prefix, or in a `RecurrentDropout`, draws once per sequence."""
    return any(noise.variational for noise in _active_noises(prefix))


def draws_at_each_step(prefix: PyTree) -> bool:
    """Whether anything in a prefix, or in a `RecurrentDropout`, draws at each step."""
    return any(not noise.variational for noise in _active_noises(prefix))


def _active_noises(prefix: PyTree) -> list[Noise]:
    leaves = jax.tree.leaves(prefix, is_leaf=_is_noise_or_none)
    return [leaf for leaf in leaves if isinstance(leaf, Noise) and not is_identity(leaf)]


def noise_per_leaf(site: str, prefix: PyTree, value: PyTree) -> list[Noise | None]:
    """Spreads a prefix of noises over the leaves of a value."""
    spread: list[Noise | None] = []
    for noise, subtree in line_up(f"dropout.{site}", prefix, value):
        if not _is_noise_or_none(noise):
            raise TypeError(
                f"dropout.{site} must hold noises such as Dropout(keep_prob=0.8) or None, "
                f"got {_describe(noise)}."
            )
        spread += [noise] * len(jax.tree.leaves(subtree))
    for (path, leaf), noise in zip(tree_leaves_with_path(value), spread, strict=True):
        if noise is not None and not jnp.issubdtype(_dtype(leaf), jnp.inexact):
            raise TypeError(
                f"{site}{keystr(path)} is {_dtype(leaf)}{list(np.shape(leaf))}, but noise needs "
                f"floating-point values; give dropout.{site} a structure with None there."
            )
    return spread


def _describe(value: Any) -> str:
    members = ("variational", "draw_mask", "apply", "expected")
    missing = [name for name in members if not hasattr(value, name)]
    if len(missing) == len(members):
        return repr(value)
    return f"a {type(value).__name__}, which lacks {', '.join(missing)} to be one"


def mask_per_leaf(site: str, masks: PyTree, value: PyTree) -> list[jax.Array | None]:
    """Lines a site's masks up with the leaves of a value."""
    found: list[jax.Array | None] = []
    for mask, subtree in line_up(f"masks.{site}", masks, value):
        leaves = jax.tree.leaves(subtree)
        if mask is not None and not jax.tree_util.all_leaves([subtree]):
            raise ValueError(
                f"masks.{site} has one mask where the value is {outline(subtree)}; "
                f"give each leaf its own."
            )
        found += [mask] * len(leaves)
    for (path, leaf), mask in zip(tree_leaves_with_path(value), found, strict=True):
        if mask is not None and not _broadcasts(np.shape(mask), np.shape(leaf)):
            raise ValueError(
                f"masks.{site}{keystr(path)} has shape {np.shape(mask)}, which does not "
                f"broadcast to the value's shape {np.shape(leaf)}."
            )
    return found


def line_up(name: str, prefix: PyTree, value: PyTree) -> list[tuple[Any, PyTree]]:
    """Pairs each entry of a prefix with the part of the value that lies under it."""
    entries, structure = jax.tree.flatten(prefix, is_leaf=_is_noise_or_none)
    try:
        subtrees = structure.flatten_up_to(value)
    except (ValueError, TypeError):
        raise ValueError(
            f"{name} has the structure {outline(prefix)}, which is no prefix of the value's "
            f"structure {outline(value)}."
        ) from None
    return list(zip(entries, subtrees, strict=True))


def outline(tree: PyTree) -> str:
    """A tree as its structure, for messages: noises and Nones are its leaves."""
    structure = jax.tree.structure(tree, is_leaf=_is_noise_or_none)
    return str(structure).removeprefix("PyTreeDef(").removesuffix(")")


def _is_noise_or_none(node: Any) -> bool:
    return node is None or isinstance(node, Noise)


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) <= len(to) and all(
        have in (1, want) for have, want in zip(reversed(shape), reversed(to), strict=False)
    )
