"""Noises on weights by their names: prefixes that are resolved where the weights are seen."""

import dataclasses
import fnmatch
import functools
from typing import Any

import jax
from jax.tree_util import GetAttrKey, tree_flatten_with_path

from ._shown import shown
from .noises.protocol import Noise

PyTree = Any
Path = tuple[str, ...]

_RECURRENT = (
    *(f"h{gate}/kernel" for gate in "ifgorzn"),  # linen's and NNX's LSTMs, linen's GRU and MGU
    "h/kernel",  # nn.SimpleCell
    "hh/kernel",  # nn.ConvLSTMCell
    "dense_h/kernel",  # nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell
    "weight_hh",  # Equinox
    "recurrent_kernel",  # this library
    "w_h",  # Haiku's GRU
    "vanilla_rnn*/linear_1/w",  # Haiku's VanillaRNN
    "hidden_to_hidden/w",  # Haiku's convolutional LSTMs
)
_JOINT = ("*lstm*/linear/w",)  # Haiku's LSTM: one kernel [D + H, 4H] for x and h


class LazyPrefix:
    """A prefix of noises that is not known before the value is seen; `resolve` then gives it."""

    def resolve(self, value: PyTree) -> PyTree:
        """The noises for a value.

        Args:
          value: the value at the site, or its shapes and dtypes.

        Returns:
          A tree shaped like the value, with a noise or None for each leaf.
        """
        raise NotImplementedError


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["noise"], meta_fields=["patterns"]
)
@dataclasses.dataclass(frozen=True)
class AtPaths(LazyPrefix):
    """`noise` on the weights whose paths match `patterns`; made by `at_paths`."""

    noise: Any
    patterns: tuple[str, ...]

    def resolve(self, value: PyTree) -> PyTree:
        """As `LazyPrefix.resolve` says; a pattern that matches nothing is a ValueError."""
        paths, structure = _array_paths(value)
        for pattern in self.patterns:
            if not any(path is not None and _matches(path, pattern) for path in paths):
                raise ValueError(
                    f"at_paths: {pattern!r} matches no weight. A pattern matches the end of a "
                    f"path, name by name.\nThe weights are {_listed(paths)}."
                )
        return _spread(self.noise, self.patterns, paths, structure)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["noise"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class RecurrentKernels(LazyPrefix):
    """`noise` on the weights that read h; made by `recurrent_kernels`."""

    noise: Any

    def resolve(self, value: PyTree) -> PyTree:
        """As `LazyPrefix.resolve` says; a cell without known recurrent kernels is a ValueError."""
        paths, structure = _array_paths(value)
        known = [path for path in paths if path is not None]
        joint = [path for path in known if _matches_any(path, _JOINT)]
        recurrent = [path for path in known if _matches_any(path, _RECURRENT)]
        # An LSTM of Haiku's among other cells would be left out without a word.
        if joint:
            raise ValueError(
                f"recurrent_kernels: {'/'.join(joint[0])} is one joint kernel for x and h, so no "
                f"noise can be put on the part for h alone.\nUse a cell with a kernel for each, "
                f"or at_paths(noise, {'/'.join(joint[0])!r}) to disturb both parts."
            )
        if not recurrent:
            raise ValueError(
                f"recurrent_kernels finds no recurrent kernel by a name of Flax's, Equinox's or "
                f"this library's cells; name it with at_paths. One kernel for both x and h cannot "
                f"be split.\nThe weights are {_listed(paths)}."
            )
        return _spread(self.noise, _RECURRENT, paths, structure)


def at_paths(noise: Noise, *patterns: str) -> AtPaths:
    """Puts noise on some of a cell's weights, chosen by name: a prefix for the `params` site.

    Where the weights are seen, it becomes a tree shaped like them, with `noise` on those that
    match a pattern and None on the others. So one spec serves cells of any structure.

    Args:
      noise: what to put on each weight that matches; each has a mask of its own.
      *patterns: such as `"h*/kernel"`. A weight's path is made of dict keys, attributes and
        indices, joined by `/`. A pattern matches the end of it, name by name, with the wildcards
        `*`, `?` and `[..]` of `fnmatch` within a name: `"kernel"` is every kernel, `"hf/kernel"`
        that of `hf`, however deep it lies.

    Returns:
      A pytree to give as `RecurrentDropout(params=...)`.

    Raises:
      TypeError: `noise` is none, or a pattern is no string.
      ValueError: there are no patterns; and where the weights are seen: one matches none of them.

    Example:
      >>> import jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> prefix = fdc.at_paths(fdc.Dropout(keep_prob=0.5, variational=True), "h?/kernel")
      >>> weights = {"hf": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}
      >>> resolved = prefix.resolve(weights)
      >>> resolved["hf"]["kernel"].keep_prob, resolved["hf"]["bias"]
      (0.5, None)
    """
    _check_noise("at_paths", noise)
    if not patterns:
        raise ValueError("at_paths needs a pattern, such as at_paths(noise, 'h*/kernel').")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"patterns must be strings such as 'h*/kernel', got {shown(pattern)}.")
    return AtPaths(noise, patterns)


def recurrent_kernels(noise: Noise) -> RecurrentKernels:
    """Puts noise on the weights that read h: weight-drop (Merity et al. 2017, arXiv:1708.02182).

    Section 2 there: DropConnect on the hidden-to-hidden matrices, once per sequence, so with
    `variational=True`. The weights are found by their names in the cells of Flax (linen and NNX),
    Equinox and this library.

    Args:
      noise: what to put on each recurrent kernel; each has a mask of its own.

    Returns:
      A pytree to give as `RecurrentDropout(params=...)`.

    Raises:
      TypeError: `noise` is none.
      ValueError: where the weights are seen: none is known as a recurrent kernel, or one kernel
        is for x and h alike, as in Haiku's LSTM.

    Example:
      >>> import jax
      >>> import flax_dropout_cell as fdc
      >>> noise = fdc.Dropout(keep_prob=0.5, variational=True)
      >>> spec = fdc.RecurrentDropout(params=fdc.recurrent_kernels(noise))
    """
    _check_noise("recurrent_kernels", noise)
    return RecurrentKernels(noise)


def _check_noise(name: str, noise: Any) -> None:
    if isinstance(noise, type) or not isinstance(noise, Noise):
        came = noise.__name__ if isinstance(noise, type) else f"a {type(noise).__name__}"
        raise TypeError(
            f"{name} takes one noise, such as Dropout(keep_prob=0.5, variational=True), got {came}."
        )


def _array_paths(value: PyTree) -> tuple[list[Path | None], Any]:
    """Each leaf's path; None for what is no array, such as a function in an Equinox module."""
    leaves, structure = tree_flatten_with_path(value)
    return [_names(path) if hasattr(leaf, "dtype") else None for path, leaf in leaves], structure


def _names(path: tuple[Any, ...]) -> Path:
    # Flax's boxes, nn.Partitioned and nnx.Param, have the array in an attribute `value`.
    if len(path) > 1 and isinstance(path[-1], GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    joined = "/".join(str(_name(key)) for key in path)
    return tuple(joined.split("/"))  # names of Haiku's modules have slashes of their own


def _name(key: Any) -> Any:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return key


def _matches(path: Path, pattern: str) -> bool:
    parts = pattern.split("/")
    if len(parts) > len(path):
        return False
    return all(
        fnmatch.fnmatchcase(name, part)
        for name, part in zip(path[-len(parts) :], parts, strict=True)
    )


def _matches_any(path: Path | None, patterns: tuple[str, ...]) -> bool:
    return path is not None and any(_matches(path, pattern) for pattern in patterns)


def _spread(
    noise: Any, patterns: tuple[str, ...], paths: list[Path | None], structure: Any
) -> PyTree:
    noises = [noise if _matches_any(path, patterns) else None for path in paths]
    return jax.tree.unflatten(structure, noises)


def _listed(paths: list[Path | None], most: int = 20) -> str:
    names = ["/".join(path) for path in paths if path is not None]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more
