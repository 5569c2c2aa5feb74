"""Noise on weights that are chosen by name, such as all recurrent kernels."""

import dataclasses
import fnmatch
import functools
from typing import Any

import jax
from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path

from .._messages import must_be
from ..noises.protocol import Noise
from .prefixes import DeferredPrefix, PyTree

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


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["noise"], meta_fields=["patterns"]
)
@dataclasses.dataclass(frozen=True)
class AtPaths(DeferredPrefix):
    """`noise` on the weights whose paths match `patterns`; made by `at_paths`."""

    noise: Any
    patterns: tuple[str, ...]

    def resolve(self, value: PyTree) -> PyTree:
        """Raises a ValueError if a pattern matches no weight; see `DeferredPrefix.resolve`."""
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
class RecurrentKernels(DeferredPrefix):
    """`noise` on the weights that read h; made by `recurrent_kernels`."""

    noise: Any

    def resolve(self, value: PyTree) -> PyTree:
        """Raises a ValueError if no recurrent kernel is known; see `DeferredPrefix.resolve`."""
        paths, structure = _array_paths(value)
        known = [path for path in paths if path is not None]
        joint = [path for path in known if _matches_any(path, _JOINT)]
        recurrent = [path for path in known if _matches_any(path, _RECURRENT)]
        # Otherwise one of Haiku's LSTMs among other cells would silently have no noise.
        if joint:
            path = "/".join(joint[0])
            raise ValueError(
                f"recurrent_kernels: {path} is one joint kernel for x and h.\n"
                f"Use a cell with a kernel for each, or at_paths(noise, {path!r}) to disturb both."
            )
        if not recurrent:
            raise ValueError(
                f"recurrent_kernels finds no recurrent kernel by a name of Flax's, Haiku's, "
                f"Equinox's or this library's cells; name it with at_paths.\n"
                f"The weights are {_listed(paths)}."
            )
        return _spread(self.noise, _RECURRENT, paths, structure)


def at_paths(noise: Noise, *patterns: str) -> AtPaths:
    """Puts noise on the weights whose paths match a pattern: a prefix for the `params` site.

    When the cell runs, it becomes a tree shaped like the weights, with `noise` on those that match
    and None on the others. So one spec serves cells of any structure.

    Args:
      noise: the noise for each weight that matches; each weight has a mask of its own.
      *patterns: such as `"h*/kernel"`. A weight's path consists of dict keys, attributes and
        indices, joined by `/`. A pattern matches the end of a path, name by name, with the
        wildcards `*`, `?` and `[..]` of `fnmatch` within a name: `"kernel"` matches every kernel,
        `"hf/kernel"` the kernel of `hf` at any depth.

    Returns:
      A pytree to give as `RecurrentDropout(params=...)`.

    Raises:
      TypeError: if `noise` is not a noise, or a pattern is not a string.
      ValueError: if there are no patterns, or, when the cell runs, if one matches no weight.

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
            raise TypeError(must_be("patterns", "strings such as 'h*/kernel'", pattern))
    return AtPaths(noise, patterns)


def recurrent_kernels(noise: Noise) -> RecurrentKernels:
    """Puts noise on the weights that read h: weight-drop (Merity et al. 2017, arXiv:1708.02182).

    Section 2 of the paper: DropConnect on the hidden-to-hidden matrices, once per sequence, so
    give a noise with `variational=True`. Weights are found by the names that they have in the
    cells of Flax (linen and NNX), Haiku, Equinox and this library.

    Args:
      noise: the noise for each recurrent kernel; each kernel has a mask of its own.

    Returns:
      A pytree to give as `RecurrentDropout(params=...)`.

    Raises:
      TypeError: if `noise` is not a noise.
      ValueError: when the cell runs, if no weight is known as a recurrent kernel, or if one kernel
        reads both x and h, as in Haiku's LSTM.

    Example:
      >>> import flax.linen as nn
      >>> import jax.numpy as jnp
      >>> import flax_dropout_cell as fdc
      >>> noise = fdc.Dropout(keep_prob=0.5, variational=True)
      >>> spec = fdc.RecurrentDropout(params=fdc.recurrent_kernels(noise))
      >>> fdc.linen.RNN(nn.SimpleCell(8), spec).describe(jnp.ones((4, 20, 3)))
      site                   value          noise                   drawn  mask        shared over
      params['h']['kernel']  float32[8, 8]  Dropout(keep_prob=0.5)  once   bool[8, 8]  steps, rows
      without noise: params['i']['bias'], params['i']['kernel'], input, state, output
      free sites inside the cell: none
    """
    _check_noise("recurrent_kernels", noise)
    return RecurrentKernels(noise)


def _check_noise(name: str, noise: Any) -> None:
    if isinstance(noise, type) or not isinstance(noise, Noise):
        raise TypeError(
            must_be(f"noise of {name}", "a noise such as Dropout(keep_prob=0.5)", noise)
        )


def _array_paths(value: PyTree) -> tuple[list[Path | None], Any]:
    """Each leaf's path; None if it is not an array, such as a function in an Equinox module."""
    leaves, structure = tree_flatten_with_path(value)
    return [_names(path) if hasattr(leaf, "dtype") else None for path, leaf in leaves], structure


def _names(path: tuple[Any, ...]) -> Path:
    # Flax's boxes, nn.Partitioned and nnx.Param, have the array in an attribute `value`.
    if len(path) > 1 and isinstance(path[-1], GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    joined = keystr(path, simple=True, separator="/")
    return tuple(joined.split("/"))  # names of Haiku's modules have slashes of their own


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
