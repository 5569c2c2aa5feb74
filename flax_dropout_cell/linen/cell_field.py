"""A module field that lives in its owner's own scope, so that the owner adds no name.

Flax names a module after the field that holds it: the weights of a wrapper's `cell` would lie
one level deeper than the bare cell's. This relies on the order in which Flax adopts a field, which
a test holds fast: it sets the module's parent, assigns the field, and only then binds the module,
by pushing a new scope if the parent is a module, and in the parent itself if that is a scope.
"""

from typing import Any

import flax.linen as nn


class CellField:
    """The descriptor of a field `cell`."""

    def __get__(self, owner: Any, cls: type | None = None) -> Any:
        try:
            return owner.__dict__["cell"]
        except (AttributeError, KeyError):
            # On the class this says, to dataclasses, that the field has no default.
            raise AttributeError("cell") from None

    def __set__(self, owner: Any, cell: Any) -> None:
        if isinstance(cell, nn.Module) and cell.scope is None and cell.parent is owner:
            object.__setattr__(cell, "parent", owner.scope)
        owner.__dict__["cell"] = cell


def waits_for_a_host(module: nn.Module, cell: Any) -> bool:
    """Whether a module that is just made should, like its cell, be bound by the host it goes to.

    Inside a compact method a module without `parent=` is bound on the spot. A cell that was made
    outside, or with `parent=None`, is bound by the host that takes it, under the host's name for
    it; its wrapper has to go with it.
    """
    unspecified = type(module).__dataclass_fields__["parent"].default
    return module.parent is unspecified and isinstance(cell, nn.Module) and cell.parent is None


def copy_with_cell(module: Any, cell: nn.Module, **kwargs: Any) -> Any:
    """Gives `module.copy(**kwargs)`, with the copy that a host would make of the bare cell.

    Flax's own copy unbinds the cells that are bound elsewhere, and with that renames them.
    """
    name = kwargs.pop("name", None)
    parent = {key: kwargs.pop(key) for key in ("parent",) if key in kwargs}
    if "cell" not in kwargs:
        kwargs["cell"] = copied = cell.copy(name=name, **parent)
        if copied.scope is not None:
            name = None  # the copied cell has it
    unspecified = type(module).__dataclass_fields__["parent"].default
    return module.clone(parent=parent.get("parent", unspecified), name=name, **kwargs)
