"""The fingerprint of a spec, by which a carry knows the spec that its masks were drawn for."""

import dataclasses
from typing import Any

import jax
import numpy as np

from .._arguments import Number
from .._spec.prefixes import is_deferred, is_prefix_leaf
from .._spec.recurrent_dropout import PyTree, RecurrentDropout
from ..noises.protocol import Noise, is_array, is_reparameterized


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class SpecFingerprint:
    """The spec that started a sequence, as text; the values of arrays do not count.

    It has no leaves, so in a carry it is part of the structure.

    Attributes:
      sites: for each site its noises in words, `*` for arrays, sorted by site.
      inputs: the dtypes of the inputs for which the masks were drawn.
      prng: the PRNG of the sequence's key.
      input_shapes: the shapes of these inputs.
    """

    sites: tuple[tuple[str, str], ...]
    input_dtypes: tuple[str, ...] = ()
    prng: Any = None
    input_shapes: tuple[tuple[int, ...], ...] = ()


def fingerprint_of(dropout: RecurrentDropout) -> tuple[tuple[str, str], ...]:
    """A spec as text, site by site, for `SpecFingerprint.sites`."""
    names = (field.name for field in dataclasses.fields(dropout))
    return tuple(sorted((name, in_words(getattr(dropout, name))) for name in names))


def check_fingerprint(fingerprint: SpecFingerprint | None, dropout: RecurrentDropout) -> None:
    """Raises if masks were drawn for another spec, because this one would scale them wrongly."""
    if not isinstance(fingerprint, SpecFingerprint):
        return  # a carry that was put together by hand
    here = dict(fingerprint_of(dropout))
    for site, drawn in fingerprint.sites:
        if here.get(site) != drawn:
            raise ValueError(
                f"the carry's masks were drawn for another spec. dropout.{site} was\n"
                f"  {_cut(drawn)}, and is\n"
                f"  {_cut(here.get(site, 'None'))}.\n"
                f"To keep the state and draw new masks, call redraw_masks."
            )


def _cut(words: str) -> str:
    return words if len(words) <= 120 else f"{words[:120]}..."


def in_words(value: Any) -> str:
    """A noise, or a prefix of noises, in words that are the same in every process."""
    if value is None or isinstance(value, str | bool | np.bool_):
        return repr(value)
    if isinstance(value, Number):
        number = value.item() if isinstance(value, np.generic) else value
        # 1 and 1.0 are one number.
        return repr(int(number)) if number in (0, 1) else repr(number)
    if is_array(value):
        return "*"
    if isinstance(value, dict) or hasattr(value, "items"):
        entries = (f"{key!r}: {in_words(value[key])}" for key in sorted(value))
        return f"{{{', '.join(entries)}}}"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        # An entry that is left out, as a carry's newer fields may be, is None.
        fields = getattr(value, "_fields")  # noqa: B009
        named = ((name, getattr(value, name)) for name in fields)
        entries = (f"{name}={in_words(entry)}" for name, entry in named if entry is not None)
        return f"{type(value).__name__}({', '.join(entries)})"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(in_words, value))})"
    name = getattr(value, "__qualname__", type(value).__qualname__)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (field.name for field in dataclasses.fields(value))
        return f"{name}({', '.join(f'{key}={in_words(getattr(value, key))}' for key in fields)})"
    return name


def fixed_arrays(dropout: RecurrentDropout) -> list[Any]:
    """The arrays of variational noises whose masks are drawn, and scaled, with these."""
    entries = jax.tree.leaves(dropout, is_leaf=is_prefix_leaf)
    return [leaf for entry in entries if _is_fixed(entry) for leaf in _arrays(entry)]


def with_fixed_arrays(dropout: RecurrentDropout, arrays: list[Any]) -> RecurrentDropout:
    """The spec with other arrays in its variational noises."""
    given = iter(arrays)

    def replace(entry: PyTree) -> PyTree:
        if not _is_fixed(entry):
            return entry
        return jax.tree.map(lambda leaf: next(given) if is_array(leaf) else leaf, entry)

    return jax.tree.map(replace, dropout, is_leaf=is_prefix_leaf)


def _is_fixed(entry: Any) -> bool:
    noise = entry.noise if is_deferred(entry) else entry
    # A learned number stays the spec's own: if the carry kept it, only the first window could have
    # a gradient.
    return isinstance(noise, Noise) and bool(noise.variational) and not is_reparameterized(noise)


def _arrays(entry: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(entry) if is_array(leaf)]
