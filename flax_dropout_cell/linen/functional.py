"""A linen cell as a function of its weights."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
from flax import errors, serialization, traverse_util

from .._flax.layer import refuse_state
from .._sites import PyTree


def pure_cell(cell: nn.RNNCellBase) -> tuple[PyTree, Any]:
    """A bound cell's weights, and the cell as a function of them."""
    free, _ = cell.unbind()
    variables = nn.unbox(_variables(cell, {}))
    params = variables.pop("params", {})

    def run(params: PyTree, carry: PyTree, x: PyTree, **options: Any) -> tuple[PyTree, PyTree]:
        try:
            return free.apply({"params": params, **variables}, carry, x, **options)
        except errors.InvalidRngError:
            raise refuse_state(cell, "draws from an rng stream") from None
        except errors.ModifyScopeVariableError:
            raise refuse_state(cell, "writes a variable") from None

    return params, run


def _variables(module: nn.Module, seen: dict[int, None]) -> dict[str, Any]:
    """A bound module's variables, as they lie in it once it is unbound.

    A module in a field that is bound elsewhere, as one that was made inside a compact method is,
    keeps its variables there, and is found under its field's name once it is unbound.
    """
    found = {name: dict(tree) for name, tree in module.variables.items()}
    for name, part in _fields(module):
        if id(part) in seen or part.scope is None or module.scope is None:
            continue
        seen[id(part)] = None
        inside = part.scope.path[:-1] == module.scope.path
        for collection, tree in _variables(part, seen).items():
            if inside:  # under the name that it was given, which unbinding takes away
                found.get(collection, {}).pop(part.scope.path[-1], None)
            if tree:
                found.setdefault(collection, {})[name] = tree
    return found


def _fields(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules in a module's fields, with the names that Flax gives them there."""
    for field in dataclasses.fields(module):
        if field.name in ("parent", "name"):
            continue
        tree = serialization.to_state_dict(getattr(module, field.name, None))
        if not isinstance(tree, dict):
            flat = {(): tree}
        else:
            flat = traverse_util.flatten_dict(tree)
        for path, part in flat.items():
            if isinstance(part, nn.Module):
                yield "_".join([field.name, *path]), part


def parts_of(module: nn.Module) -> Iterator[nn.Module]:
    """A module, and all that it holds in its fields."""
    yield module
    for _, part in _fields(module):
        yield from parts_of(part)
