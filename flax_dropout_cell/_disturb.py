"""What noise does at a site: draws a mask for each leaf, and puts it on the value there."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._inside import Sites
from ._random.keys import fold_in, is_threefry, leaf_rng
from ._sites import (
    STATE,
    Leaf,
    Masks,
    PyTree,
    RecurrentDropout,
    Site,
    active_noises,
    broadcasts,
    draws_once,
    dtype_of,
    line_up,
    outline,
)
from .noises.protocol import Noise, is_identity, needs_previous


@dataclasses.dataclass(frozen=True)
class Disturbance:
    """All that disturbs one step: the noises, the masks drawn before it, and the step's key.

    Attributes:
      dropout: which noise sits where.
      masks: the masks that are already drawn.
      rng: the step's key, typed. Without a key and without masks it is evaluation.
      row_ids: ids `[*batch]` that rows draw by, or None where they draw by their place.
    """

    dropout: RecurrentDropout
    masks: Masks | None
    rng: jax.Array | None
    row_ids: jax.Array | None = None

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
        return draw_mask(site, noise, rng, value, self.row_ids)


def inside_names(dropout: RecurrentDropout) -> frozenset[str]:
    """The sites inside a cell that hold noise."""
    return frozenset(name for name, prefix in dropout.inside.items() if active_noises(prefix))


def draw_site(
    site: Site, dropout: RecurrentDropout, value: PyTree, rng: jax.Array, row_ids: Any = None
) -> PyTree:
    """Draws a site's variational masks for a value, or for its shapes and dtypes."""
    if not draws_once(site.of(dropout)):
        return None
    leaves, structure = line_up(site, dropout, None, value)
    return jax.tree.unflatten(
        structure,
        [
            draw_mask(site, leaf.noise, site_rng(rng, site, index), leaf.value, row_ids)
            if leaf.noise is not None and draws_once(leaf.noise)
            else None
            for index, leaf in enumerate(leaves)
        ],
    )


def site_rng(rng: jax.Array, site: Site, index: int) -> jax.Array:
    """The key of a leaf's mask."""
    if site.inside:
        return leaf_rng(rng, "inside", index, inside=site.name)
    return leaf_rng(rng, site.name, index)


def draw_mask(
    site: Site, noise: Noise, rng: jax.Array, leaf: Any, row_ids: jax.Array | None
) -> jax.Array:
    """Draws one leaf's mask, and refuses one that does not fit it."""
    shape, dtype = tuple(np.shape(leaf)), dtype_of(leaf)
    if row_ids is None or site.name == "params" or _shares_rows(noise, shape, row_ids.ndim):
        mask = noise.draw_mask(rng, shape, dtype)
    else:
        mask = _draw_rows(noise, rng, shape, dtype, row_ids)
    if not broadcasts(np.shape(mask), shape):
        raise ValueError(
            f"dropout.{site}: {type(noise).__name__}.draw_mask gave the shape {np.shape(mask)}, "
            f"which does not broadcast to the value's shape {shape}."
        )
    return mask


def _shares_rows(noise: Noise, shape: tuple[int, ...], batch_ndim: int) -> bool:
    return any(dim % len(shape) < batch_ndim for dim in getattr(noise, "broadcast_dims", ()))


def _draw_rows(
    noise: Noise, rng: jax.Array, shape: tuple[int, ...], dtype: Any, row_ids: jax.Array
) -> jax.Array:
    """Draws each row's mask from the row's own key."""
    batch_ndim = row_ids.ndim
    dims = getattr(noise, "broadcast_dims", ())
    if dims:
        inner = tuple(dim % len(shape) - batch_ndim for dim in dims)
        noise = dataclasses.replace(noise, broadcast_dims=inner)  # type: ignore[type-var]

    def draw_row(row_id: jax.Array) -> jax.Array:
        return noise.draw_mask(row_rng(rng, row_id), shape[batch_ndim:], dtype)

    # JAX's rbg gives all rows of a vmap the bits of the first key.
    draw_rows = jax.vmap(draw_row) if is_threefry(rng) else lambda ids: jax.lax.map(draw_row, ids)
    rows = draw_rows(row_ids.reshape(math.prod(row_ids.shape)))
    return rows.reshape(row_ids.shape + rows.shape[1:])


def row_rng(rng: jax.Array, row_id: jax.Array) -> jax.Array:
    """A row's key: the same for equal ids, whatever integer type they have."""
    bits = jnp.iinfo(row_id.dtype).bits
    low = row_id.astype(jnp.uint32)
    high = row_id >> (32 if bits == 64 else bits - 1)
    if bits < 64 and jnp.issubdtype(row_id.dtype, jnp.unsignedinteger):
        high = jnp.zeros_like(row_id)
    return fold_in(fold_in(rng, low), high.astype(jnp.uint32))


def previous_leaves(site: Site, previous: PyTree, value: PyTree) -> list[Any]:
    """The leaves of what a site held at the step before, for each leaf of its value."""
    leaves, structure = jax.tree.flatten(value)
    if previous is None:
        return [None] * len(leaves)
    if jax.tree.structure(previous) != structure:
        raise ValueError(
            f"the cell took a carry of structure {outline(previous)} and returned one of "
            f"structure {outline(value)}; they must be the same."
            if site == STATE
            else f"disturb({site.name!r}, ..): previous has the structure {outline(previous)} and "
            f"value {outline(value)}; they must be the same."
        )
    return jax.tree.leaves(previous)


def _check_kind(site: Site, noise: Noise, method: str, leaf: jax.Array, result: Any) -> Any:
    got, wanted = jax.typeof(result), jax.typeof(leaf)
    if (got.shape, got.dtype) != (wanted.shape, wanted.dtype):
        raise TypeError(
            f"dropout.{site}: {type(noise).__name__}.{method} gave {got.dtype}{list(got.shape)} "
            f"for a value of {wanted.dtype}{list(wanted.shape)}; both must be the same."
        )
    return result
