"""Noise at a site: the mask of each leaf, drawn or given, and its application to the value."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._messages import short_repr
from .._sharding import place_like
from .._spec.match_leaves import Leaf, match_leaves
from .._spec.prefixes import structure_str, weaken_like
from .._spec.recurrent_dropout import STATE, Masks, PyTree, RecurrentDropout, Site
from ..noises.protocol import Noise, is_identity, needs_previous
from .call_cell import DisturbFn
from .draw_masks import draw_leaf, inside_names, site_rng
from .sequence_ids import SequenceIds


@dataclasses.dataclass(frozen=True)
class StepNoise:
    """The noise of one step: the spec, the masks that are already drawn, and the step's key.

    Attributes:
      dropout: the noise at each site.
      masks: the masks that are already drawn.
      rng: the step's key, typed. Without a key and without masks, this is evaluation.
      ids: the ids of the rows; None if they have none.
    """

    dropout: RecurrentDropout
    masks: Masks | None
    rng: jax.Array | None
    ids: SequenceIds | None = None

    @property
    def evaluates(self) -> bool:
        """Whether every site gives its expected value."""
        return self.masks is None and self.rng is None

    def __call__(
        self,
        site: Site,
        value: PyTree,
        previous: PyTree = None,
        where: Callable[[Leaf], bool] = lambda leaf: True,
    ) -> PyTree:
        """The value at a site with its noise, at the leaves that `where` selects.

        In evaluation, each noise gives its expected value.
        """
        if site.of(self.dropout) is None and (self.masks is None or site.of(self.masks) is None):
            return value
        leaves, structure = match_leaves(site, self.dropout, self.masks, value)
        olds = previous_leaves(site, previous, value)
        with jax.named_scope(f"dropout_{site.name}"):
            disturbed = [
                self._leaf(site, index, leaf, old) if where(leaf) else leaf.value
                for index, (leaf, old) in enumerate(zip(leaves, olds, strict=True))
            ]
        return jax.tree.unflatten(structure, disturbed)

    def disturb_fn(self) -> DisturbFn | None:
        """The cell's `disturb` argument; None if no site inside the cell has noise or a mask."""
        names = inside_names(self.dropout)
        # A cell is called with `disturb=` only if it must: it need not take the argument.
        if self.masks is not None:  # a mask is applied even if its noise would draw none
            given = (self.masks.inside or {}).items()
            names |= {name for name, masks in given if jax.tree.leaves(masks)}
        if not names:
            return None
        return DisturbFn(names, lambda name, *values: self(Site(name, inside=True), *values))

    def _leaf(self, site: Site, index: int, leaf: Leaf, old: Any) -> Any:
        noise, mask = leaf.noise, leaf.mask
        if noise is None:
            return leaf.value
        if needs_previous(noise) and old is None:
            raise ValueError(
                f"dropout.{site}: {type(noise).__name__} needs the value of the step before, and "
                f"the cell passes none there. This library's cells pass one at 'hidden', and an "
                f"LSTM at 'memory' too; in your own, call disturb({site.name!r}, value, previous)."
            )
        value = jnp.asarray(leaf.value)
        if self.evaluates:
            return _check_kind(site, noise, "expected", value, noise.expected(value, old))
        if mask is None:
            if is_identity(noise):
                return value
            mask = self._draw(site, index, noise, value)
        elif site == STATE:
            # Only here is a mask drawn for one value, the incoming carry, and applied to another.
            _check_mask_has_rows(noise, mask, value, old)
        mask = place_like(mask, value)
        return _check_kind(site, noise, "apply", value, noise.apply(mask, value, old))

    def _draw(self, site: Site, index: int, noise: Noise, value: jax.Array) -> jax.Array:
        if noise.variational:
            raise ValueError(
                f"dropout.{site} is variational and has no mask: call draw_masks before the loop, "
                f"once per sequence, and pass masks=."
            )
        if self.rng is None:
            raise ValueError(
                f"dropout.{site} draws at each step, so it needs a key as rng; got None."
            )
        rng = site_rng(self.rng, site, index)
        return draw_leaf(site, noise, rng, value, self.ids)


def previous_leaves(site: Site, previous: PyTree, value: PyTree) -> list[Any]:
    """The leaves of the site's value at the step before, in the order of the value's leaves."""
    leaves, structure = jax.tree.flatten(value)
    if previous is None:
        return [None] * len(leaves)
    if jax.tree.structure(previous) != structure:
        raise ValueError(
            f"disturb({site.name!r}, ..): previous has another structure than value: "
            f"{structure_str(previous)}, {structure_str(value)}."
        )
    return jax.tree.leaves(previous)


def _check_mask_has_rows(noise: Noise, mask: Any, value: jax.Array, old: Any) -> None:
    """Raises if a one-row state mask would be shared by all rows."""
    if np.shape(mask) != np.shape(old) or np.shape(old) == value.shape:
        return
    if getattr(noise, "broadcast_dims", ()):
        return
    raise ValueError(
        f"the carry came in with shape {np.shape(old)} and leaves the cell with {value.shape}, so "
        f"all rows would share its mask. Start from jnp.broadcast_to(carry, {value.shape})."
    )


def _check_kind(site: Site, noise: Noise, method: str, leaf: jax.Array, result: Any) -> Any:
    """The result in the leaf's type; raises if its shape or dtype is another."""
    if not hasattr(result, "shape"):
        gave = f"dropout.{site}: {type(noise).__name__}.{method} gave {short_repr(result)}"
        raise TypeError(f"{gave}; it must return an array.")
    got, wanted = jax.typeof(result), jax.typeof(leaf)
    if (got.shape, got.dtype) != (wanted.shape, wanted.dtype):
        raise TypeError(
            f"dropout.{site}: {type(noise).__name__}.{method} gave {got.dtype}{list(got.shape)} "
            f"for a value of {wanted.dtype}{list(wanted.shape)}; both must be the same."
        )
    return weaken_like(result, leaf)
