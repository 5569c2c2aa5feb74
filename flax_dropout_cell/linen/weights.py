"""The weights of a linen cell as one tree, and how to run the cell on other weights.

A cell may hold modules that are bound elsewhere, such as one that was made in a compact method.
Their weights are in scopes of their own. In the tree they are under the name of the field that
holds them, as if the cell had made them itself.
"""

from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
from flax.core import Scope, unfreeze
from flax.core.meta import AxisMetadata
from jax.tree_util import keystr, tree_leaves_with_path

from .._flax.wrapper import CellWrapper
from .._spec.recurrent_dropout import PyTree
from .submodules import fields_of

Path = tuple[str, ...]


def weights_of(cell: nn.Module) -> dict[str, Any]:
    """The weights of a bound cell, unboxed, those of bound modules in its fields included."""
    tree: dict[str, Any] = {}
    for path, scope in _outermost(list(_scopes(cell, (), set()))):
        boxed: Any = scope.variables().get("params", {})
        params = unfreeze(boxed)
        plain = tree
        for name in path if params else ():
            plain = plain.setdefault(name, {})
        plain.update(unbox(params))
    return tree


def unbox(tree: Any) -> Any:
    """Weights without their partitioning metadata. Shapes or tags may stand for the weights."""

    def unboxed(leaf: Any) -> Any:
        if isinstance(leaf, nn.Partitioned):  # its constraint on the sharding needs an array
            return unbox(leaf.unbox(apply_constraint=False))
        return nn.unbox(leaf)

    return jax.tree.map(unboxed, tree, is_leaf=lambda leaf: isinstance(leaf, AxisMetadata))


def run_on(cell: nn.Module, others: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Runs a bound cell with other weights; it keeps its own for paths that `others` lacks."""
    by_path = {_names(keys): leaf for keys, leaf in tree_leaves_with_path(others)}
    paths = _paths_by_scope(cell)

    def exchange(variables: Any) -> Any:
        leaves, structure = jax.tree.flatten(variables)
        pairs = zip(next(paths), leaves, strict=True)
        return structure.unflatten([by_path.get(path, leaf) for path, leaf in pairs])

    def call(cell: Any, *args: Any) -> Any:
        return cell(*args, **kwargs)

    return nn.map_variables(call, "params", exchange)(cell, *args)


def _paths_by_scope(cell: nn.Module) -> Iterator[list[Path]]:
    """For each call that `nn.map_variables` makes, the paths of its arrays in `weights_of(cell)`.

    It calls once for each scope, and does not say for which. The arrays do not tell either, as two
    scopes may hold the same ones (tied weights). So a first pass puts a tag in place of each array,
    and looks where the tags come out.
    """
    tagged: list[list[_Tag]] = []

    def tag(variables: Any) -> Any:
        leaves, structure = jax.tree.flatten(variables)
        tagged.append([_Tag() for _ in leaves])
        return structure.unflatten(tagged[-1])

    found: dict[_Tag, Path] = {}

    def look(cell: nn.Module) -> None:
        for keys, leaf in tree_leaves_with_path(weights_of(cell)):
            found[leaf] = _names(keys)

    nn.map_variables(look, "params", tag)(cell)
    return iter([[found[leaf] for leaf in leaves] for leaves in tagged])


class _Tag:
    """Stands for an array."""


def _scopes(module: nn.Module, path: Path, seen: set[int]) -> Iterator[tuple[Path, Scope]]:
    """The scopes of a module and of the modules in its fields, each under its field's name."""
    if id(module) in seen or module.scope is None:
        return
    seen.add(id(module))
    yield path, module.scope
    for name, part in fields_of(module):
        # A wrapper adds no name to the path: it shares the scope of the cell that it holds.
        yield from _scopes(part, path if isinstance(module, CellWrapper) else (*path, name), seen)


def _outermost(found: list[tuple[Path, Scope]]) -> list[tuple[Path, Scope]]:
    """The scopes that are not inside another one of those found."""
    kept: list[tuple[Path, Scope]] = []
    for path, scope in found:
        others = [other for _, other in found if other != scope]
        known = any(other == scope for _, other in kept)
        if not known and not any(_lies_in(scope, other) for other in others):
            kept.append((path, scope))
    return kept


def _lies_in(scope: Scope, other: Scope) -> bool:
    parent = scope.parent
    while parent is not None:
        if parent == other:
            return True
        parent = parent.parent
    return False


def _names(keys: Any) -> Path:
    return tuple(keystr((key,), simple=True) for key in keys)
