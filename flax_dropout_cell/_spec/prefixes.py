"""Prefixes of pytrees: how noises and masks are matched with a value, and facts about leaves."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from .._compat import as_weakly_typed, shape_struct
from .._sharding import explicit_sharding, type_of
from ..noises.protocol import Noise

PyTree = Any


class DeferredPrefix:
    """A prefix of noises that depends on the value's structure; `resolve` makes it."""

    def resolve(self, value: PyTree) -> PyTree:
        """The noises for a value.

        Args:
          value: the value at the site, or its shapes and dtypes.

        Returns:
          A tree shaped like the value, with a noise or None for each leaf.
        """
        raise NotImplementedError


def zip_prefix(name: str, prefix: PyTree, value: PyTree) -> list[tuple[Any, PyTree]]:
    """Pairs each leaf of a prefix with the subtree of the value beneath it."""
    # `jax.tree.broadcast` would do, but its errors name neither the site nor a noise.
    entries, structure = jax.tree.flatten(prefix, is_leaf=is_prefix_leaf)
    try:
        subtrees = structure.flatten_up_to(value)
    except (ValueError, TypeError):
        raise ValueError(f"{name} {_say_mismatch(prefix, value)}") from None
    return list(zip(entries, subtrees, strict=True))


def _say_mismatch(prefix: PyTree, value: PyTree, path: str = "") -> str:
    """Says why one tree is not a prefix of another: by name if dicts have other keys."""
    if isinstance(prefix, Mapping) and isinstance(value, Mapping):
        at = f" at {path}" if path else ""
        if unknown := _names(prefix.keys() - value.keys()):
            return f"names {unknown}{at}, which the value does not have: it has {_names(value)}."
        if missing := _names(value.keys() - prefix.keys()):
            return f"has no entry for {missing}{at}: write None there."
        for key, below in prefix.items():
            if _differs(below, value[key]):
                return _say_mismatch(below, value[key], f"{path}[{key!r}]")
    at, ours, theirs = path and f" at {path}", structure_str(prefix), structure_str(value)
    if theirs == "*":
        return f"has the structure {ours}{at}, but the value is one array: it takes one noise."
    return (
        f"has the structure {ours}{at}, which is not a prefix of the value's structure {theirs}: a "
        f"value takes one noise, or None."
    )


def _differs(prefix: PyTree, value: PyTree) -> bool:
    try:
        jax.tree.structure(prefix, is_leaf=is_prefix_leaf).flatten_up_to(value)
    except (ValueError, TypeError):
        return True
    return False


def _names(keys: Iterable[Any]) -> str:
    return ", ".join(sorted(map(repr, keys)))


def structure_str(tree: PyTree) -> str:
    """A tree as Python writes it, with `*` for leaves; noises and Nones count as leaves."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_prefix_leaf)
    return tree_str(structure, ["*"] * len(leaves))


def tree_str(structure: Any, leaves: list[str]) -> str:
    """A tree of given texts as Python writes it, cut if it is long."""
    try:
        text = repr(jax.tree.unflatten(structure, map(_Text, leaves)))
    except Exception:  # a constructor of the user's, which texts do not suit
        text = ""
    if not text or " object at 0x" in text:
        text = str(structure).removeprefix("PyTreeDef(").removesuffix(")")
    return text if len(text) <= 300 else f"{text[:300]}..."


class _Text(str):
    def __repr__(self) -> str:
        return str(self)


def is_prefix_leaf(node: Any) -> bool:
    """Whether a node of a prefix covers the whole subtree beneath it."""
    return node is None or isinstance(node, Noise) or is_deferred(node)


def is_deferred(node: Any) -> bool:
    """Whether a node is a `DeferredPrefix` with a noise, such as `at_paths` makes."""
    return isinstance(node, DeferredPrefix) and isinstance(getattr(node, "noise", None), Noise)


def dtype_of(leaf: Any) -> Any:
    """A leaf's dtype as JAX has it: NumPy's float64 is float32, unless x64 is on."""
    return leaf.dtype if isinstance(leaf, jax.Array) else jnp.result_type(leaf)


def weaken_like(value: jax.Array, leaf: Any) -> jax.Array:
    """A value of a leaf's dtype, weakly typed if the leaf is, so that it widens no other value."""
    is_weak = jax.typeof(leaf).weak_type and not jax.typeof(value).weak_type
    return as_weakly_typed(value) if is_weak else value


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether one shape broadcasts to another without changing it."""
    return len(shape) <= len(to) and all(
        have in (1, want) for have, want in zip(reversed(shape), reversed(to), strict=False)
    )


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape, dtype and shardings of a leaf: an array, a tracer or a Python number."""
    shape = cast(tuple[int, ...], np.shape(leaf))
    return shape_struct(shape, dtype_of(leaf), explicit_sharding(leaf), type_of(leaf))
