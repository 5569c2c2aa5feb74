"""`RecurrentDropout`: the noise at each site of a cell."""

import dataclasses
import inspect
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import GetAttrKey

from .._messages import short_repr
from ..noises.protocol import Noise, check_noise, is_identity
from .nn_jit_hash import nn_jit_hash
from .prefixes import (
    PyTree,
    is_deferred,
    is_prefix_leaf,
    zip_prefix,
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RecurrentDropout:
    """The noise at each site of a recurrent cell.

    A *site* is a place where noise may be applied, and a *noise* is a rule for drawing and
    applying a mask, such as `Dropout`. Each site takes a pytree prefix of noises, as `in_axes` is
    a prefix for `jax.vmap`: one noise for all leaves of the value, `None` for no noise, or a
    structure of noises. Each leaf has a mask of its own.

    If all probabilities are numbers, a spec is hashable: it can be a static argument of `jax.jit`,
    and passes through it unchanged. Probabilities that are arrays are its leaves.

    Args:
      input: noise on the cell's input at a step.
      state: noise on the carry that the cell returns. One noise for an LSTM's whole state means h
        alone, because dropout on c would scale it by `1 / keep_prob` at each step. The same happens
        in every cell that adds to its state: use `scale=False` or `Zoneout` there. If the state of
        another cell has several leaves, give a structure such as `state=(None, noise)`.
      output: noise on the cell's output, independent of `state` even if the output is h.
      params: noise on the cell's weights (weight-drop: Merity et al. 2017, arXiv:1708.02182,
        section 2).
      inside: noise at sites inside the cell, by name:
        `inside={"candidate": Dropout(keep_prob=0.75)}`.

    Raises:
      TypeError: if a site holds an object that is not a noise, a name is not a site's, or `inside`
        is not a dict.
      ValueError: if `at_paths` or `recurrent_kernels` is only a part of a site.

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

    # Before dataclasses' own __init__, which would say "unexpected keyword argument".
    def __new__(cls, *positional: Any, **sites: Any) -> "RecurrentDropout":
        unknown = sorted(sites.keys() - _FIELDS)
        if positional or unknown:
            got = ", ".join([*map(short_repr, positional), *map(repr, unknown)])
            raise TypeError(
                f"RecurrentDropout takes noises by the names of sites, {', '.join(_FIELDS)}, such "
                f"as input=noise, or inside={{'name': noise}} for a site of the cell; got {got}."
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        names = self.inside if isinstance(self.inside, dict) else [None]
        if not all(isinstance(name, str) for name in names):
            raise TypeError("dropout.inside must be a dict such as {'candidate': noise}.")
        for site in sites_of(self):
            for entry in jax.tree.leaves(site.of(self), is_leaf=is_prefix_leaf):
                if is_deferred(entry):
                    if entry is not site.of(self):
                        raise ValueError(
                            f"at_paths and recurrent_kernels must be the whole of dropout.{site}, "
                            f"not a part of it: give one at_paths all paths, or write a structure."
                        )
                elif entry is not None:
                    check_noise(f"dropout.{site}", entry)

    def __bool__(self) -> bool:
        # Flax's `nn.RNN(cell, dropout)` would take it for `time_major=True`, and drop nothing.
        raise TypeError(
            "a RecurrentDropout is neither true nor false: compare it with None. Flax's own RNN "
            "takes no dropout: write fdc.linen.RNN(cell, dropout) or fdc.nnx.RNN(cell, dropout)."
        )

    def __hash__(self) -> int:
        # dataclasses would hash the fields, of which `inside` is a dict.
        leaves, structure = jax.tree.flatten(self)
        return hash((structure, *leaves))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RecurrentDropout):
            return NotImplemented
        if jax.tree.structure(self) != jax.tree.structure(other):
            return False
        pairs = zip(jax.tree.leaves(self), jax.tree.leaves(other), strict=True)
        return all(
            ours is theirs or (np.shape(ours) == np.shape(theirs) and bool(np.all(ours == theirs)))
            for ours, theirs in pairs
        )

    @property
    def __fn_or_cls__(self) -> tuple[Hashable, ...]:
        """The key by which Flax's `nn.jit` hashes a module's field that is a spec."""
        return nn_jit_hash(self)


_FIELDS = tuple(field.name for field in dataclasses.fields(RecurrentDropout))

# `__new__` only makes a clearer error; users should see the signature of `__init__`.
_named = inspect.signature(RecurrentDropout.__init__)
RecurrentDropout.__signature__ = _named.replace(  # type: ignore[attr-defined]
    parameters=[parameter for name, parameter in _named.parameters.items() if name != "self"]
)


def _flatten(spec: RecurrentDropout) -> tuple[list[Any], None]:
    return [getattr(spec, name) for name in _FIELDS], None


def _flatten_with_keys(spec: RecurrentDropout) -> tuple[list[Any], None]:
    return [(GetAttrKey(name), getattr(spec, name)) for name in _FIELDS], None


def _unflatten(_: None, values: Any) -> RecurrentDropout:
    # Skip the constructor's checks: tree functions may put any object in the place of a noise.
    spec = object.__new__(RecurrentDropout)
    vars(spec).update(zip(_FIELDS, values, strict=True))
    return spec


jax.tree_util.register_pytree_with_keys(RecurrentDropout, _flatten_with_keys, _unflatten, _flatten)


class Masks(NamedTuple):
    """Drawn masks, one field for each site.

    A field is `None`, or a tree shaped like the value at the site. Its leaves are masks that
    broadcast to the value's leaves, or `None`. `inside` is a dict of such trees, by site name.
    """

    params: PyTree = None
    input: PyTree = None
    state: PyTree = None
    output: PyTree = None
    inside: PyTree = None


class SiteValues(NamedTuple):
    """The value at each site, or its shapes and dtypes; None if no mask needs them."""

    params: PyTree
    input: PyTree
    state: PyTree
    output: PyTree
    inside: PyTree


class Site(NamedTuple):
    """A place for noise: one of the four around a cell, or one inside it, with a name."""

    name: str
    inside: bool = False

    def of(self, holder: RecurrentDropout | Masks | SiteValues) -> PyTree:
        """This site's part of a spec, of masks or of values."""
        return (holder.inside or {}).get(self.name) if self.inside else getattr(holder, self.name)

    def __str__(self) -> str:
        return f"inside[{self.name!r}]" if self.inside else self.name


PARAMS, INPUT, STATE, OUTPUT = AROUND = tuple(
    Site(name) for name in ("params", "input", "state", "output")
)


def sites_of(holder: RecurrentDropout | Masks | SiteValues) -> Iterator[Site]:
    """The four sites around a cell, and the inside ones that a spec or masks name."""
    yield from AROUND
    for name in holder.inside or {}:
        yield Site(name, inside=True)


def make_masks(by_site: dict[Site, PyTree]) -> Masks:
    """`Masks` from a tree for each site."""
    around = {site.name: tree for site, tree in by_site.items() if not site.inside}
    inside = {site.name: tree for site, tree in by_site.items() if site.inside and tree is not None}
    return Masks(**around, inside=inside or None)


def fill_in(masks: Masks, drawn: Masks) -> Masks:
    """The masks that the caller gives, and the drawn ones where it gives none."""

    def fill(site: Site) -> PyTree:
        given, fresh = site.of(masks), site.of(drawn)
        if given is None or fresh is None:
            return fresh if given is None else given
        pairs = zip_prefix(f"masks.{site}", given, fresh)
        return jax.tree.unflatten(
            jax.tree.structure(given, is_leaf=lambda mask: mask is None),
            [subtree if mask is None else mask for mask, subtree in pairs],
        )

    # Each site once, in a fixed order: a set's would change the order of equations.
    sites = dict.fromkeys([*sites_of(masks), *sites_of(drawn)])
    return make_masks({site: fill(site) for site in sites})


def draws_once(prefix: PyTree) -> bool:
    """Whether anything in a prefix, or in a `RecurrentDropout`, draws once per sequence."""
    return any(noise.variational for noise in active_noises(prefix))


def draws_at_each_step(prefix: PyTree) -> bool:
    """Whether anything in a prefix, or in a `RecurrentDropout`, draws at each step."""
    return any(not noise.variational for noise in active_noises(prefix))


def active_noises(prefix: PyTree) -> list[Noise]:
    """The noises in a prefix, without those that do nothing, such as keep_prob 1."""
    entries = jax.tree.leaves(prefix, is_leaf=is_prefix_leaf)
    noises = [entry.noise if is_deferred(entry) else entry for entry in entries]
    return [noise for noise in noises if isinstance(noise, Noise) and not is_identity(noise)]
