"""What noise does at a site: draws a mask for each leaf, and puts it on the value there."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._inside import Sites
from ._random.keys import leaf_rng
from ._rows import Rows, draw_rows, draws_by_row
from ._sites import (
    PARAMS,
    STATE,
    Leaf,
    Masks,
    PyTree,
    RecurrentDropout,
    Site,
    active_noises,
    draws_at_each_step,
    draws_once,
    line_up,
)
from ._trees import broadcasts, dtype_of, outline
from .noises.protocol import Noise, is_identity, needs_previous


@dataclasses.dataclass(frozen=True)
class Disturbance:
    """All that disturbs one step: the noises, the masks drawn before it, and the step's key.

    Attributes:
      dropout: which noise sits where.
      masks: the masks that are already drawn.
      rng: the step's key, typed. Without a key and without masks it is evaluation.
      rows: what rows draw by; None where they draw by their place.
    """

    dropout: RecurrentDropout
    masks: Masks | None
    rng: jax.Array | None
    rows: Rows | None = None

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
        """The value at a site, disturbed `where` asked; in evaluation, what is expected there."""
        if site.of(self.dropout) is None and (self.masks is None or site.of(self.masks) is None):
            return value
        leaves, structure = line_up(site, self.dropout, self.masks, value)
        olds = previous_leaves(site, previous, value)
        with jax.named_scope(f"dropout_{site.name}"):
            disturbed = [
                self._leaf(site, index, leaf, old) if where(leaf) else leaf.value
                for index, (leaf, old) in enumerate(zip(leaves, olds, strict=True))
            ]
        return jax.tree.unflatten(structure, disturbed)

    def sites(self) -> Sites | None:
        """What the cell gets as `disturb`; None where no site inside holds noise."""
        names = inside_names(self.dropout)
        if not names:
            return None
        return Sites(names, lambda name, *values: self(Site(name, inside=True), *values))

    def _leaf(self, site: Site, index: int, leaf: Leaf, old: Any) -> Any:
        noise, mask = leaf.noise, leaf.mask
        if noise is None:
            return leaf.value
        if needs_previous(noise) and old is None:
            raise ValueError(
                f"dropout.{site}: {type(noise).__name__} needs the value of the step before, and "
                f"the cell gives none there. Call disturb({site.name!r}, value, previous) in it."
            )
        value = jnp.asarray(leaf.value)
        if self.evaluates:
            return _check_kind(site, noise, "expected", value, noise.expected(value, old))
        if mask is None:
            if is_identity(noise):
                return value
            mask = self._draw(site, index, noise, value)
        elif site == STATE:
            _check_rows(noise, mask, value, old)
        return _check_kind(site, noise, "apply", value, noise.apply(mask, value, old))

    def _draw(self, site: Site, index: int, noise: Noise, value: jax.Array) -> jax.Array:
        if noise.variational:
            raise ValueError(
                f"dropout.{site} is variational and has no mask: call draw_masks before the loop, "
                f"once per sequence, and pass masks=. Drawn here, the mask would differ at each "
                f"step."
            )
        if self.rng is None:
            raise ValueError(
                f"dropout.{site} draws a fresh mask at each step, so it needs rng, a key such as "
                f"jax.random.key(0); got rng=None and no mask for it."
            )
        rng = site_rng(self.rng, site, index)
        return draw_mask(site, noise, rng, value, self.rows)


def inside_names(dropout: RecurrentDropout) -> frozenset[str]:
    """The sites inside a cell that hold noise."""
    return frozenset(name for name, prefix in dropout.inside.items() if active_noises(prefix))


def draw_site(
    site: Site,
    dropout: RecurrentDropout,
    value: PyTree,
    rng: jax.Array,
    rows: Rows | None = None,
    *,
    rows_alone: bool = False,
    at_step: bool = False,
) -> PyTree:
    """Draws a site's variational masks for a value, or for its shapes and dtypes.

    With `rows_alone` only the masks that each row has for itself. With `at_step` those of the
    other noises, from a step's key.
    """
    is_drawn = draws_at_each_step if at_step else draws_once
    if not is_drawn(site.of(dropout)):
        return None

    def draw(index: int, leaf: Leaf) -> jax.Array | None:
        if leaf.noise is None or not is_drawn(leaf.noise):
            return None
        if rows_alone and rows is not None and not _by_row(site, leaf.noise, leaf.value, rows):
            return None
        return draw_mask(site, leaf.noise, site_rng(rng, site, index), leaf.value, rows)

    leaves, structure = line_up(site, dropout, None, value)
    return jax.tree.unflatten(structure, [draw(*pair) for pair in enumerate(leaves)])


def site_rng(rng: jax.Array, site: Site, index: int) -> jax.Array:
    """The key of a leaf's mask."""
    if site.inside:
        return leaf_rng(rng, "inside", index, inside=site.name)
    return leaf_rng(rng, site.name, index)


def draw_mask(site: Site, noise: Noise, rng: jax.Array, leaf: Any, rows: Rows | None) -> jax.Array:
    """Draws one leaf's mask, and refuses one that does not fit it."""
    shape, dtype = tuple(np.shape(leaf)), dtype_of(leaf)
    if rows is not None and _by_row(site, noise, leaf, rows):
        mask = draw_rows(noise, rng, shape, dtype, rows)
    else:
        mask = noise.draw_mask(rng, shape, dtype)
    if not broadcasts(np.shape(mask), shape):
        raise ValueError(
            f"dropout.{site}: {type(noise).__name__}.draw_mask gave the shape {np.shape(mask)}, "
            f"which does not broadcast to the value's shape {shape}."
        )
    return mask


def _by_row(site: Site, noise: Noise, leaf: Any, rows: Rows) -> bool:
    shape = tuple(np.shape(leaf))
    if site != PARAMS and shape[: len(rows.batch)] != rows.batch:
        raise ValueError(
            f"a value at {site} has shape {shape} at a step, which does not start with the batch "
            f"dims of sequence_ids or resets, {rows.batch}."
        )
    return draws_by_row(str(site), noise, shape, len(rows.batch))


def previous_leaves(site: Site, previous: PyTree, value: PyTree) -> list[Any]:
    """The leaves of what a site held at the step before, for each leaf of its value."""
    leaves, structure = jax.tree.flatten(value)
    if previous is None:
        return [None] * len(leaves)
    if jax.tree.structure(previous) != structure:
        raise ValueError(
            f"disturb({site.name!r}, ..): previous has the structure {outline(previous)} and "
            f"value {outline(value)}; they must be the same."
        )
    return jax.tree.leaves(previous)


def _check_rows(noise: Noise, mask: Any, value: jax.Array, old: Any) -> None:
    """Refuses a state's mask that all rows would share, for it was drawn for one row's carry."""
    if np.shape(mask) != np.shape(old) or np.shape(old) == value.shape:
        return
    if getattr(noise, "broadcast_dims", ()):
        return
    raise ValueError(
        f"the carry came in with shape {np.shape(old)} and leaves the cell with {value.shape}, so "
        f"all rows would share the mask that was drawn for it. Start with "
        f"jnp.broadcast_to(carry, {value.shape}), and draw the masks from that."
    )


def _check_kind(site: Site, noise: Noise, method: str, leaf: jax.Array, result: Any) -> Any:
    got, wanted = jax.typeof(result), jax.typeof(leaf)
    if (got.shape, got.dtype) != (wanted.shape, wanted.dtype):
        raise TypeError(
            f"dropout.{site}: {type(noise).__name__}.{method} gave {got.dtype}{list(got.shape)} "
            f"for a value of {wanted.dtype}{list(wanted.shape)}; both must be the same."
        )
    return result
