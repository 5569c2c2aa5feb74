"""A linen cell as a function of its weights."""

from typing import Any

import flax.linen as nn
import jax
from flax import errors
from flax.core import unfreeze

from .._flax.compat import all_but_params, copy_into, has_drawn, is_compiled, scope_at
from .._flax.layer import impure_cell_error
from .._spec.recurrent_dropout import PyTree
from .submodules import fields_of

_CAPTURED = "intermediates"
"""The collection of `capture_intermediates`; each call has its own."""


class LinenPureCell:
    """A bound cell as a function of its weights.

    It runs in a scope with the path and the streams of the cell's own scope, so that errors, tables
    and captured values show the cell's path. The weights are its argument. Other effects of the
    cell cannot be part of a pure function: drawing and writing raise, and sown values are
    collected.

    Attributes:
      params: the cell's weights.
    """

    def __init__(self, cell: nn.RNNCellBase) -> None:
        self._cell = cell
        self._scope: Any = cell.scope
        self._free, _ = cell.unbind()
        self._variables = nn.unbox(variables_of(cell))
        self._variables.pop(_CAPTURED, None)
        self.params: PyTree = self._variables.pop("params", {})

    @property
    def collects(self) -> bool:
        """Whether the call's `mutable` may ask for values that the cell sows."""
        return self._scope.mutable is not False and not self._cell.is_initializing()

    def __call__(
        self, params: PyTree, carry: PyTree, x: PyTree, **options: Any
    ) -> tuple[PyTree, PyTree]:
        """One step; with `collects`, the output is `(y, sown)`."""
        cell, variables = self._cell, {"params": params, **self._variables}
        # Weights are an argument: a cell may not write them, and nn.remat would return new ones.
        mutable = all_but_params(self._scope.mutable) if self.collects else False
        try:
            with scope_at(self._scope, variables, mutable).temporary() as scope:
                free = copy_into(scope, self._free)
                carry, y = free(carry, x, **options)
                drew, written = has_drawn(scope), scope.mutable_variables()
        except errors.InvalidRngError:
            carry, y, drew, written = None, None, True, {}
        except errors.ModifyScopeVariableError:
            raise impure_cell_error(cell, "writes a variable") from None
        if drew:
            # A key from outside of the scan would be the same at every step.
            reason = ", as nn.jit does for each cell that it compiles," if is_compiled(cell) else ""
            raise impure_cell_error(cell, f"draws from an rng stream{reason}")
        return carry, (y, self._sown(variables, written)) if self.collects else y

    def put_back(self, sown: PyTree) -> None:
        """Gives sown values to the cell's own scope, each stacked over time."""
        for collection, tree in sown.items():
            for name, new in tree.items():
                old = self._scope.get_variable(collection, name, {})
                self._scope.put_variable(collection, name, _appended(unfreeze(old), new))

    def _sown(self, before: PyTree, written: PyTree) -> PyTree:
        """The values that a step has sown; raises if it has written anything else."""
        sown = {}
        for collection, tree in unfreeze(written).items():
            added = tree if collection == _CAPTURED else self._added(before.get(collection), tree)
            if added:
                sown[collection] = added
        return sown

    def _added(self, old: PyTree, new: PyTree) -> PyTree:
        """The part of a tree that `sow` has added: it appends to tuples, or begins them."""
        if isinstance(new, dict):
            added = {name: self._added((old or {}).get(name), it) for name, it in new.items()}
            return {name: it for name, it in added.items() if it}
        old = () if old is None else old
        if isinstance(new, tuple) and isinstance(old, tuple) and len(new) > len(old):
            return new[len(old) :]  # nn.remat and others replace the values before
        if _identities(new) != _identities(old):
            raise impure_cell_error(self._cell, "writes a variable")
        return ()


def _identities(tree: PyTree) -> list[int]:
    return list(map(id, jax.tree.leaves(tree)))


def _appended(old: PyTree, new: PyTree) -> PyTree:
    if isinstance(new, dict):
        return {**old, **{name: _appended(old.get(name, {}), tree) for name, tree in new.items()}}
    return (*(old or ()), *new)


def variables_of(module: nn.Module) -> dict[str, Any]:
    """A bound module's variables, as they lie in it once it is unbound."""
    return _variables(module, set())


def _variables(module: nn.Module, seen: set[int]) -> dict[str, Any]:
    """`variables_of` without the modules that were seen.

    A module in a field that is bound elsewhere, as one that was made inside a compact method is,
    keeps its variables there, and is found under its field's name once it is unbound.
    """
    variables: Any = module.variables
    found = {name: unfreeze(tree) for name, tree in variables.items()}
    for name, part in fields_of(module):
        if id(part) in seen or part.scope is None or module.scope is None:
            continue
        seen.add(id(part))
        inside = part.scope.path[:-1] == module.scope.path
        for collection, tree in _variables(part, seen).items():
            if inside:  # under the name that it was given, which unbinding takes away
                found.get(collection, {}).pop(part.scope.path[-1], None)
            if tree:
                found.setdefault(collection, {})[name] = tree
    return found
