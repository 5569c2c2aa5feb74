"""Which noise sits where: the sites of a cell, and noises and masks lined up with values there."""

import dataclasses
import inspect
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path

from ._fingerprint import fingerprint
from ._shown import shown
from ._trees import PyTree, broadcasts, dtype_of, is_entry, is_lazy, outline, pair_up
from .noises.protocol import Noise, check_noise, is_array, is_identity, needs_previous


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RecurrentDropout:
    """Says which noise sits where in a recurrent cell.

    Each site takes a pytree prefix of noises, as `in_axes` is a prefix for `jax.vmap`: one noise
    for all leaves of the value there, `None` for none, or a structure of them. Each leaf has a
    mask of its own.

    With numbers for probabilities a spec is hashable, so it can be a static argument, and passes
    through `jax.jit` unchanged; arrays are its leaves.

    Args:
      input: noises on what the cell reads at a step.
      state: noises on the carry that the cell returns. One noise for an LSTM's whole state is
        applied to h alone: dropout on the memory c would make it grow by `1 / keep_prob` at each
        step. Where the state of another cell has several leaves, say which:
        `state=(None, noise)`.
      output: noises on what the cell emits, independent of `state` even where it emits h.
      params: noises on the cell's weights (weight-drop: Merity et al. 2017, arXiv:1708.02182,
        section 2).
      inside: noises at sites that the cell itself has, by their names:
        `inside={"candidate": Dropout(keep_prob=0.75)}`.

    Raises:
      TypeError: a site holds something that is no noise.

    Example:
      >>> import jax
      >>> import flax_dropout_cell as fdc
      >>> spec = fdc.RecurrentDropout(
      ...     input=fdc.Dropout(keep_prob=0.9, variational=True),
      ...     state=(None, fdc.Dropout(keep_prob=jax.numpy.float32(0.8))),
      ... )
      >>> jax.tree.leaves(spec)
      [Array(0.8, dtype=float32)]
    """

    input: PyTree = None
    state: PyTree = None
    output: PyTree = None
    params: PyTree = None
    inside: dict[str, PyTree] = dataclasses.field(default_factory=dict)

    def __new__(cls, *positional: Any, **sites: Any) -> "RecurrentDropout":
        unknown = sorted(sites.keys() - _FIELDS)
        if positional or unknown:
            raise TypeError(
                f"RecurrentDropout takes noises by the names of their sites, {', '.join(_FIELDS)}, "
                f"such as RecurrentDropout(input=Dropout(keep_prob=0.8)); got "
                f"{', '.join([*map(shown, positional), *map(repr, unknown)])}. A site that the "
                f"cell has itself is written inside={{'name': noise}}."
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        names = self.inside if isinstance(self.inside, dict) else [None]
        if not all(isinstance(name, str) for name in names):
            raise TypeError(
                "dropout.inside must be a dict from the names of a cell's sites to noises, such "
                "as {'candidate': Dropout(keep_prob=0.75)}."
            )
        for site in sites_of(self):
            for entry in jax.tree.leaves(site.of(self), is_leaf=is_entry):
                if entry is not None and not is_lazy(entry):
                    check_noise(f"dropout.{site}", entry)

    def __hash__(self) -> int:
        leaves, structure = jax.tree.flatten(self)
        return hash((structure, *leaves))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RecurrentDropout):
            return NotImplemented
        if jax.tree.structure(self) != jax.tree.structure(other):
            return False
        pairs = zip(jax.tree.leaves(self), jax.tree.leaves(other), strict=True)
        return all(ours is theirs or bool(np.all(ours == theirs)) for ours, theirs in pairs)

    @property
    def __fn_or_cls__(self) -> tuple[Hashable, ...]:
        """What Flax's `nn.jit` hashes of a module's field in its place."""
        return fingerprint(self)


_FIELDS = tuple(field.name for field in dataclasses.fields(RecurrentDropout))

# `__new__` is there for its error alone.
_named = inspect.signature(RecurrentDropout.__init__)
RecurrentDropout.__signature__ = _named.replace(  # type: ignore[attr-defined]
    parameters=[parameter for name, parameter in _named.parameters.items() if name != "self"]
)


def _flatten(spec: RecurrentDropout) -> tuple[list[Any], None]:
    return [getattr(spec, name) for name in _FIELDS], None


def _flatten_with_keys(spec: RecurrentDropout) -> tuple[list[Any], None]:
    return [(GetAttrKey(name), getattr(spec, name)) for name in _FIELDS], None


def _unflatten(_: None, values: Any) -> RecurrentDropout:
    # Without the constructor's checks: tree functions put anything where a noise was.
    spec = object.__new__(RecurrentDropout)
    vars(spec).update(zip(_FIELDS, values, strict=True))
    return spec


jax.tree_util.register_pytree_with_keys(RecurrentDropout, _flatten_with_keys, _unflatten, _flatten)


class Masks(NamedTuple):
    """Drawn masks, a field for each site.

    A field is `None`, or a tree shaped like the value there that holds, for each leaf, a mask
    that broadcasts to it or `None`. `inside` is a dict of such trees, by the names of the sites.
    """

    params: PyTree = None
    input: PyTree = None
    state: PyTree = None
    output: PyTree = None
    inside: PyTree = None


class Site(NamedTuple):
    """A place for noise: one of the four around a cell, or one that the cell has and names."""

    name: str
    inside: bool = False

    def of(self, holder: RecurrentDropout | Masks) -> PyTree:
        """This site's part of a spec or of masks."""
        return (holder.inside or {}).get(self.name) if self.inside else getattr(holder, self.name)

    def __str__(self) -> str:
        return f"inside[{self.name!r}]" if self.inside else self.name


PARAMS, INPUT, STATE, OUTPUT = AROUND = tuple(
    Site(name) for name in ("params", "input", "state", "output")
)


def sites_of(holder: RecurrentDropout | Masks) -> Iterator[Site]:
    """The four sites around a cell, and the inside ones that a spec or masks name."""
    yield from AROUND
    for name in holder.inside or {}:
        yield Site(name, inside=True)


def make_masks(by_site: dict[Site, PyTree]) -> Masks:
    """`Masks` from a tree for each site."""
    around = {site.name: tree for site, tree in by_site.items() if not site.inside}
    inside = {site.name: tree for site, tree in by_site.items() if site.inside and tree is not None}
    return Masks(**around, inside=inside or None)


def draws_once(prefix: PyTree) -> bool:
    """Whether anything in a prefix, or in a `RecurrentDropout`, draws once per sequence."""
    return any(noise.variational for noise in active_noises(prefix))


def draws_at_each_step(prefix: PyTree) -> bool:
    """Whether anything in a prefix, or in a `RecurrentDropout`, draws at each step."""
    return any(not noise.variational for noise in active_noises(prefix))


def active_noises(prefix: PyTree) -> list[Noise]:
    """The noises in a prefix that do something."""
    entries = jax.tree.leaves(prefix, is_leaf=is_entry)
    noises = [entry.noise if is_lazy(entry) else entry for entry in entries]
    return [noise for noise in noises if isinstance(noise, Noise) and not is_identity(noise)]


class Leaf(NamedTuple):
    """One array at a site, the noise that sits on it, and the mask that was brought for it."""

    path: str
    value: Any
    noise: Noise | None
    mask: jax.Array | None


def line_up(
    site: Site, dropout: RecurrentDropout, masks: Masks | None, value: PyTree
) -> tuple[list[Leaf], Any]:
    """Lines a site's noises and masks up with the leaves of its value."""
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
        and not any(leaf.noise for leaf in leaves)
    ):
        raise ValueError(
            "dropout.params has noise, but no weights came for it: they are closed over, or kept "
            "where the cell does not show them. Pass them as `params`."
        )
    return leaves, structure


def _spread_noises(site: Site, prefix: PyTree, value: PyTree) -> list[Noise | None]:
    if is_lazy(prefix):
        prefix = prefix.resolve(value)
    spread: list[Noise | None] = []
    for noise, subtree in pair_up(f"dropout.{site}", prefix, value):
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
            f"{name} is {dtype}{list(np.shape(leaf))}, but noise needs floating-point values; "
            f"give dropout.{site} a structure with None there."
        )
    if needs_previous(noise) and not (site.inside or site == STATE):
        raise ValueError(
            f"dropout.{site}: {type(noise).__name__} needs the value of the step before, and "
            f"{site} has none. Put it at state, or inside a cell at a site that says what it held "
            f"before: memory and hidden in this library's cells."
        )
    return True


def _spread_masks(site: Site, masks: PyTree, value: PyTree) -> list[jax.Array | None]:
    found: list[jax.Array | None] = []
    for mask, subtree in pair_up(f"masks.{site}", masks, value):
        if mask is not None and not jax.tree_util.all_leaves([subtree]):
            raise ValueError(
                f"masks.{site} has one mask where the value is {outline(subtree)}; "
                f"give each leaf its own."
            )
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
