"""One step of a cell under dropout, and the masks that a whole sequence shares."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._random.keys import check_rng, fold_in
from ._sites import (
    SITES,
    Masks,
    PyTree,
    RecurrentDropout,
    draws_once,
    mask_per_leaf,
    noise_per_leaf,
    outline,
)
from .noises.protocol import Noise, is_identity

Cell = Callable[[Any, Any, Any], tuple[Any, Any]]
"""`cell(params, carry, x) -> (carry, y)`, any pytrees; `flax.linen.LSTMCell(64).apply` is one."""


def dropout_cell(
    params: PyTree,
    carry: PyTree,
    x: PyTree,
    rng: jax.Array | None,
    *,
    cell: Cell,
    dropout: RecurrentDropout,
    masks: Masks | None = None,
) -> tuple[PyTree, PyTree]:
    """One step of `cell` under dropout.

    Noise goes on the params and the input, then the cell runs on the untouched incoming carry,
    then noise goes on the outgoing carry, then on the output. A leaf that has a mask in `masks`
    uses it. Any other leaf draws one from `rng` if its noise is per-step, while a variational
    noise must have its mask: it is drawn once per sequence, before the loop, by `draw_masks`.

    Args:
      params: the cell's weights.
      carry: the incoming carry.
      x: the input at this step.
      rng: this step's key. None with `masks=None` is evaluation: every site gives its expected
        value. None with masks applies these and draws nothing.
      cell: `cell(params, carry, x) -> (carry, y)`.
      dropout: which noise sits where.
      masks: the masks that are already drawn.

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
      ...     params, jnp.zeros((4, 8)), jnp.ones((4, 3)), jax.random.key(0),
      ...     cell=cell, dropout=spec,
      ... )
      >>> h.shape, y.shape
      ((4, 8), (4, 8))
    """
    check_dropout(dropout)
    check_masks(masks)
    check_rng(rng)

    def disturb(site: str, value: PyTree, previous: PyTree = None) -> PyTree:
        return disturb_site(site, getattr(dropout, site), value, previous, masks, rng)

    new_carry, y = call_cell(cell, disturb("params", params), carry, disturb("input", x))
    return disturb("state", new_carry, carry), disturb("output", y)


def draw_masks(
    params: PyTree,
    carry: PyTree,
    x: PyTree,
    rng: jax.Array,
    *,
    cell: Cell,
    dropout: RecurrentDropout,
) -> Masks:
    """Draws the masks of the variational noises, for one sequence.

    Call it before the loop, once per sequence, and hand the result to every `dropout_cell` of
    that sequence (Gal and Ghahramani 2016, arXiv:1512.05287, section 4). Each mask depends on
    `rng`, its site, its leaf and the noise there.

    Args:
      params: the cell's weights.
      carry: a carry. Of this, `params` and `x` only shapes and dtypes are used, so
        `jax.ShapeDtypeStruct`s do as well.
      x: the input at one step, without the time axis.
      rng: the sequence's key.
      cell: `cell(params, carry, x) -> (carry, y)`; never run, only traced for its output's shape.
      dropout: which noise sits where.

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
    check_rng(rng)
    if rng is None:
        raise ValueError("draw_masks needs a key such as jax.random.key(0), got rng=None.")
    y = None
    if draws_once(dropout.output):
        _, y = jax.eval_shape(lambda *args: call_cell(cell, *args), params, carry, x)
    return draw_sites(dropout, Masks(params, x, carry, y), rng)


def draw_sites(dropout: RecurrentDropout, values: Masks, rng: jax.Array) -> Masks:
    """Draws the variational masks for `values`: each site's value, or its shapes and dtypes."""

    def draw_site(site: str) -> PyTree:
        prefix, value = getattr(dropout, site), getattr(values, site)
        if not draws_once(prefix):
            return None
        leaves, structure = jax.tree.flatten(value)
        drawn = [
            noise.draw_mask(_leaf_rng(rng, site, index), tuple(leaf.shape), leaf.dtype)
            if noise is not None and draws_once(noise)
            else None
            for index, (leaf, noise) in enumerate(
                zip(leaves, noise_per_leaf(site, prefix, value), strict=True)
            )
        ]
        return jax.tree.unflatten(structure, drawn)

    with jax.named_scope("draw_masks"):
        return Masks(*(draw_site(site) for site in SITES))


def disturb_site(
    site: str,
    prefix: PyTree,
    value: PyTree,
    previous: PyTree,
    masks: Masks | None,
    rng: jax.Array | None,
) -> PyTree:
    """Puts a site's noises on its value, each leaf with its mask or with a fresh one."""
    site_masks = None if masks is None else getattr(masks, site)
    if prefix is None and site_masks is None:
        return value
    leaves, structure = jax.tree.flatten(value)
    noises = noise_per_leaf(site, prefix, value)
    drawn = mask_per_leaf(site, site_masks, value)
    olds = [None] * len(leaves) if previous is None else _previous_leaves(previous, value)
    evaluate = masks is None and rng is None

    def disturb(index: int) -> Any:
        leaf, noise, mask, old = leaves[index], noises[index], drawn[index], olds[index]
        if noise is None:
            if mask is not None:
                raise ValueError(f"masks.{site} has a mask where dropout.{site} has no noise.")
            return leaf
        leaf = jnp.asarray(leaf)
        if evaluate:
            return _check_kind(site, noise, "expected", leaf, noise.expected(leaf, old))
        if mask is None:
            if is_identity(noise):
                return leaf
            mask = _draw_step_mask(site, index, noise, leaf, rng)
        return _check_kind(site, noise, "apply", leaf, noise.apply(mask, leaf, old))

    with jax.named_scope(f"dropout_{site}"):
        return jax.tree.unflatten(structure, [disturb(index) for index in range(len(leaves))])


def _check_kind(site: str, noise: Noise, method: str, leaf: jax.Array, result: Any) -> Any:
    got, wanted = jax.typeof(result), jax.typeof(leaf)
    if (got.shape, got.dtype) != (wanted.shape, wanted.dtype):
        raise TypeError(
            f"dropout.{site}: {type(noise).__name__}.{method} gave {got.dtype}{list(got.shape)} "
            f"for a value of {wanted.dtype}{list(wanted.shape)}; both must be the same."
        )
    return result


def _draw_step_mask(
    site: str, index: int, noise: Noise, leaf: jax.Array, rng: jax.Array | None
) -> jax.Array:
    if noise.variational:
        raise ValueError(
            f"dropout.{site} is variational and has no mask: call draw_masks before the loop, "
            f"once per sequence, and pass masks=. Drawn here, the mask would differ at each step."
        )
    if rng is None:
        raise ValueError(
            f"dropout.{site} draws a fresh mask at each step, so it needs rng, a key such as "
            f"jax.random.key(0); got rng=None and no mask for it."
        )
    return noise.draw_mask(_leaf_rng(rng, site, index), leaf.shape, leaf.dtype)


def _leaf_rng(rng: jax.Array, site: str, index: int) -> jax.Array:
    # Steps fold in numbers below 2**31 (see dropout_scan), so sites start there: a mask for the
    # sequence never shares a key with one for a step.
    return fold_in(rng, np.uint32(2**31 + SITES.index(site) * 2**28 + index))


def _previous_leaves(previous: PyTree, value: PyTree) -> list[Any]:
    if jax.tree.structure(previous) != jax.tree.structure(value):
        raise ValueError(
            f"the cell took a carry of structure {outline(previous)} and returned one of "
            f"structure {outline(value)}; they must be the same."
        )
    return jax.tree.leaves(previous)


def call_cell(cell: Cell, params: PyTree, carry: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
    """Runs the cell and checks that it gives a pair."""
    result = cell(params, carry, x)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"cell must return (carry, y), got {type(result).__name__}.")
    return result


def check_dropout(dropout: Any) -> None:
    """Refuses what is no `RecurrentDropout`."""
    if not isinstance(dropout, RecurrentDropout):
        raise TypeError(
            f"dropout must be a RecurrentDropout, such as "
            f"RecurrentDropout(input=Dropout(keep_prob=0.8)), got {dropout!r}."
        )


def check_masks(masks: Any) -> None:
    """Refuses what is neither `Masks` nor None."""
    if masks is not None and not isinstance(masks, Masks):
        raise TypeError(f"masks must be Masks, as draw_masks gives them, got {masks!r}.")
