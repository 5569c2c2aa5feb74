"""The weights of a linen cell as one tree, and a run of the cell on other weights.

A cell may hold modules that are bound elsewhere, as what is made in a compact method is: their
weights lie in scopes of their own. In the tree they lie under the name of the field that holds
them, where they would be if the cell had made them.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax.core import Scope, unfreeze
from jax.tree_util import tree_leaves_with_path

from .._flax.wrapper import CellWrapper
from .._sites import PyTree

Path = tuple[str, ...]


class Weights(NamedTuple):
    """The weights of a bound cell.

    Attributes:
      tree: all of them, unboxed, as plain nested dicts.
      scopes: for each scope that Flax hands to `nn.map_variables`, its arrays and their paths
        in `tree`.
    """

    tree: dict[str, Any]
    scopes: list[list[tuple[Path, Any]]]


def weights_of(cell: nn.Module) -> Weights:
    """Reads the weights of a bound cell, those of bound modules in its fields included."""
    tree: dict[str, Any] = {}
    scopes = []
    for path, scope in _outermost(list(_scopes(cell, (), set()))):
        params: Any = scope.variables().get("params", {})
        boxed = unfreeze(params)
        plain = tree
        for name in path if boxed else ():
            plain = plain.setdefault(name, {})
        plain.update(nn.unbox(boxed))
        paths = [(*path, *_names(keys)) for keys, _ in tree_leaves_with_path(nn.unbox(boxed))]
        scopes.append(list(zip(paths, jax.tree.leaves(boxed), strict=True)))
    return Weights(tree, scopes)


def run_on(
    cell: nn.Module, weights: Weights, others: PyTree, *args: Any, **kwargs: Any
) -> tuple[Any, Any]:
    """Runs a bound cell with other weights; what `others` lacks stays as it is."""
    by_path = {tuple(_names(keys)): leaf for keys, leaf in tree_leaves_with_path(others)}
    waiting = list(weights.scopes)

    def exchange(variables: Any) -> Any:
        # Flax calls this once for each scope, and does not say for which: its arrays tell.
        leaves, structure = jax.tree.flatten(variables)
        for scope in waiting:
            if [id(leaf) for _, leaf in scope] == [id(leaf) for leaf in leaves]:
                waiting.remove(scope)
                return structure.unflatten([by_path.get(path, leaf) for path, leaf in scope])
        raise RuntimeError("Flax handed in a scope that this cell does not hold; please report it.")

    def call(cell: Any, *args: Any) -> Any:
        return cell(*args, **kwargs)

    return nn.map_variables(call, "params", exchange)(cell, *args)


def restrict(tree: PyTree, masks: PyTree) -> PyTree:
    """The part of a tree of weights for which masks were drawn."""
    if not isinstance(tree, dict) or not isinstance(masks, dict):
        return tree
    return {name: restrict(tree[name], mask) for name, mask in masks.items() if name in tree}


def _scopes(module: nn.Module, path: Path, seen: set[int]) -> Iterator[tuple[Path, Scope]]:
    """The scopes of a module and of the modules in its fields, each under its field's name."""
    if id(module) in seen or module.scope is None:
        return
    seen.add(id(module))
    yield path, module.scope
    for field in dataclasses.fields(module):
        if field.name in ("parent", "name") or not field.init:
            continue
        leaves = tree_leaves_with_path(
            getattr(module, field.name), is_leaf=lambda node: isinstance(node, nn.Module)
        )
        for keys, value in leaves:
            if isinstance(value, nn.Module):
                # A wrapper adds no name: what it holds counts as the cell itself.
                adds_no_name = isinstance(module, CellWrapper)
                name = () if adds_no_name else ("_".join((field.name, *_names(keys))),)
                yield from _scopes(value, path + name, seen)


def _outermost(found: list[tuple[Path, Scope]]) -> list[tuple[Path, Scope]]:
    """Leaves out the scopes that lie in another one of those found."""
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


def _names(keys: Any) -> list[str]:
    return [
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys
    ]
