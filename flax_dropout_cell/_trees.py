"""Trees, and prefixes of trees: how they are lined up, and what is asked of a leaf."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from .noises.protocol import Noise

PyTree = Any


def pair_up(name: str, prefix: PyTree, value: PyTree) -> list[tuple[Any, PyTree]]:
    """Pairs each entry of a prefix with the part of the value that lies under it."""
    entries, structure = jax.tree.flatten(prefix, is_leaf=is_entry)
    try:
        subtrees = structure.flatten_up_to(value)
    except (ValueError, TypeError):
        raise ValueError(
            f"{name} has the structure {outline(prefix)}, which is no prefix of the value's "
            f"structure {outline(value)}. One noise, or None, stands for all that lies under it."
        ) from None
    return list(zip(entries, subtrees, strict=True))


def outline(tree: PyTree) -> str:
    """A tree as its structure, for messages: noises and Nones are its leaves."""
    structure = jax.tree.structure(tree, is_leaf=is_entry)
    shown = str(structure).removeprefix("PyTreeDef(").removesuffix(")")
    return shown if len(shown) <= 300 else f"{shown[:300]}..."


def is_entry(node: Any) -> bool:
    """Whether a node of a prefix stands for all that lies under it."""
    return node is None or isinstance(node, Noise) or is_lazy(node)


def is_lazy(node: Any) -> bool:
    """Whether a node is a prefix that is made where the value is seen, such as `at_paths`."""
    return hasattr(node, "resolve") and isinstance(getattr(node, "noise", None), Noise)


def dtype_of(leaf: Any) -> Any:
    """A leaf's dtype; a Python number has the one that JAX gives it."""
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether one shape broadcasts to another without changing it."""
    return len(shape) <= len(to) and all(
        have in (1, want) for have, want in zip(reversed(shape), reversed(to), strict=False)
    )


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """A leaf's shape and dtype, whatever kind of number or array it is."""
    return jax.ShapeDtypeStruct(cast(tuple[int, ...], np.shape(leaf)), dtype_of(leaf))
