"""Every use of Flax that its documentation does not promise, or that differs between its versions.

The rest of the package uses documented names only, so when Flax changes, this is the file to fix.
The one exception is `RecurrentDropout.__fn_or_cls__`, which Flax reads from the spec itself.
JAX has a file of its own, `_compat.py`, because the core does not import Flax.
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
from flax import config, core, nnx

from .._messages import short_repr
from ..noises.protocol import is_array

# In Flax 0.11 an attribute is static if its value is not an array; there is nothing to say.
static = getattr(nnx, "static", lambda value: value)


def data_or_static(value: Any) -> Any:
    """An attribute of an NNX module, which may change its kind: arrays are data, numbers static."""
    return nnx.data(value) if is_array(value) else static(value)


def raw_value(variable: nnx.Variable) -> Any:
    """A variable's value as it is stored, which its `get_value` may turn into another."""
    if not hasattr(variable, "get_raw_value"):  # Flax 0.11
        return variable.raw_value
    value = variable.get_raw_value()
    return variable.get_value() if isinstance(value, jax.Ref) else value


class CellField:
    """The descriptor of a field `cell` that lives in its owner's own scope.

    Flax names a module after the field that holds it, so the weights of a wrapper's `cell` would
    lie one level deeper than the bare cell's. This relies on the order in which Flax adopts a
    field, which a test pins down: it sets the module's parent, assigns the field, and only then
    binds the module, by pushing a new scope if the parent is a module, and in the parent itself if
    that is a scope.
    """

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


def should_stay_unbound(module: nn.Module, cell: Any) -> bool:
    """Whether a module that is just made should, like its cell, be bound by the host it goes to.

    Inside a compact method a module without `parent=` is bound on the spot. A cell that was made
    outside, or with `parent=None`, is bound by the host that takes it, under the host's name for
    it; its wrapper has to go with it.
    """
    made_inside = module.parent is _unspecified_parent(module)
    return made_inside and isinstance(cell, nn.Module) and cell.parent is None


def _unspecified_parent(module: nn.Module) -> Any:
    """The default of `parent=`, which is not None: None asks for an unbound module."""
    return type(module).__dataclass_fields__["parent"].default


def copy_with_cell(module: Any, cell: nn.Module, **kwargs: Any) -> Any:
    """`module.copy(**kwargs)`, with the copy that a host would make of the bare cell.

    Flax's own copy unbinds the cells that are bound elsewhere, and with that renames them.
    """
    name = kwargs.pop("name", None)
    parent = {"parent": kwargs.pop("parent")} if "parent" in kwargs else {}
    if "cell" not in kwargs:
        kwargs["cell"] = copied = cell.copy(name=name, **parent)
        if copied.scope is not None:
            name = None  # the copied cell has it
    return module.clone(
        parent=parent.get("parent", _unspecified_parent(module)), name=name, **kwargs
    )


def copy_into(scope: core.Scope | None, module: nn.Module, *, renamed: bool = False) -> Any:
    """A copy of a module, and of all that it holds, in a scope or, with None, in none.

    If `renamed`, the modules that it holds forget the names that a host has given them.
    """
    return module.clone(parent=scope, _deep_clone=True, _reset_names=renamed)


def scope_at(outer: Any, variables: Any, mutable: Any) -> core.Scope:
    """A scope of its own variables, with the path and the streams of another."""
    scope = core.bind(variables, rngs=outer.rngs, mutable=mutable)
    scope.name, scope.path, scope.debug_path = outer.name, outer.path, outer.debug_path
    return scope


def all_but_params(mutable: Any) -> Any:
    """A filter of mutable collections, without `params`."""
    return core.scope.subtract_filters(mutable, "params")


def has_drawn(scope: core.Scope) -> bool:
    """Whether anything has drawn from the streams of a scope, or of one within it."""
    return _is_counted(scope.rng_counters)


def _is_counted(counters: Any) -> bool:
    # The counters of inner scopes lie among those of the scope, transformed ones too.
    return any(_is_counted(c) if isinstance(c, dict) else c > 0 for c in counters.values())


def running_module() -> nn.Module | None:
    """The linen module whose method is running; None outside of any."""
    return nn.module._context.module_stack[-1]


_COMPILED = "Jit"
"""`nn.jit` calls its copy of a class by the class's name behind this."""


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is of a class that `nn.jit` has made."""
    return type(module).__name__.startswith(_COMPILED)


def give_own_stream(module: nn.Module) -> bool:
    """Makes the keys of a module's `dropout` stream differ from those of all other modules.

    Flax tells modules apart by their paths, which it folds into their keys. `nn.jit` and
    `nn.fold_rngs` drop the paths; the module that they transform gets a new key, but those that
    were made outside of it, such as its fields, all have the same one. Here such a module gets its
    path back. One inside it would need that too, but the program that `nn.jit` compiles for it may
    also serve other paths.

    Returns:
      Whether it could; if False, other modules draw the same keys.
    """
    scope: Any = module.scope
    key = scope.rngs["dropout"]
    if getattr(key, "suffix", ()) == scope.path or not _is_given(_lifted(module)):
        return True
    is_hashed = isinstance(inspect.getattr_static(module, "__fn_or_cls__", None), HashedFields)
    if key.suffix or not is_hashed or _pathless_around(scope.debug_path[-1:]) > 1:
        return False
    scope.rngs = scope.rngs | {"dropout": key.replace(suffix=scope.path)}
    return True


def path_with_same_key(module: nn.Module) -> str | None:
    """The path of another module that has drawn the key that this one has just drawn, if any.

    Flax hashes the names on a path without a separator, so the modules 1/10 and 11/0 have one key,
    unless `flax_fix_rng_separator` is set.
    """
    if config.flax_fix_rng_separator:
        return None
    scope: Any = module.scope
    names = (*scope.rngs["dropout"].suffix, scope.rng_counters["dropout"])
    hashed = b"".join(
        name.encode() if isinstance(name, str) else name.to_bytes((name.bit_length() + 7) // 8)
        for name in names
    )
    # At the root, so that it lasts as long as the call of `apply`.
    drawn = scope.root.__dict__.setdefault("_dropout_keys", {})
    other = drawn.setdefault(hashed, names)
    return None if other == names else "/".join(map(str, other[:-1]))


def _is_given(module: nn.Module) -> bool:
    """Whether a module whose scope is lifted was made outside of the module that is transformed.

    That module is the first to run inside of the transformation, so its caller runs outside.
    """
    stack = nn.module._context.module_stack
    runs = [each is not None and each.scope and _lifted(each) is module for each in stack]
    # A method that Flax does not wrap, such as initialize_carry, is not on the stack.
    at = runs.index(True) if True in runs else len(stack)
    caller = stack[at - 1] if at else None
    inside, outside = _pathless_around(_debug_path(module)), _pathless_around(_debug_path(caller))
    if caller is None or outside == 0:
        return False
    host = _lifted(caller)
    is_within = _path(module)[: len(_path(host))] == _path(host)
    return outside == inside or not is_within or _is_given(host)


def _lifted(module: nn.Module) -> nn.Module:
    """The outermost module of the program in which a module runs; a transform made its scope."""
    while isinstance(module.parent, nn.Module):
        module = module.parent
    return module


def _path(module: nn.Module) -> tuple[str, ...]:
    return module.scope.path if module.scope else ()


def _debug_path(module: nn.Module | None) -> tuple[str, ...]:
    """The path, in which Flax writes each transformation around the name of what it lifts."""
    return tuple(module.scope.debug_path) if module is not None and module.scope else ()


def _pathless_around(debug_path: tuple[str, ...]) -> int:
    """The number of transformations around a module that drop paths."""
    return len(re.findall(r"(?:jit|fold_rngs)\(", " ".join(debug_path)))


class HashedFields:
    """The descriptor of `__fn_or_cls__`, which Flax reads before it hashes a module for `nn.jit`.

    `nn.jit` compiles once for all modules whose fields hash alike, with the fields as constants.
    A `RecurrentDropout` gives it the values of its arrays to hash. A field that is an array itself
    cannot: Flax refuses it as "iteration over a 0-d array", so a clear error is raised here. And
    the path of a module that was made outside is hashed too, because masks depend on it.
    """

    nowrap = True
    """Keeps Flax from wrapping the descriptor in another, which turns each error into its own."""

    def __init__(self) -> None:
        self._entered: set[int] = set()

    def __get__(self, module: Any, cls: type | None = None) -> Iterator[Any]:
        if module is not None and id(module) not in self._entered:
            _check_no_arrays(module)
            key = module.scope.rngs.get("dropout") if module.scope else None
            if getattr(key, "suffix", ()):
                return self._with_path(module)
        raise AttributeError("__fn_or_cls__")

    def _with_path(self, module: nn.Module) -> Iterator[Any]:
        yield "/".join(_path(module))
        self._entered.add(id(module))
        try:
            yield module
        finally:
            self._entered.remove(id(module))


def _check_no_arrays(module: Any) -> None:
    for field in (field.name for field in dataclasses.fields(module)):
        if field in ("parent", "name", "cell"):
            continue
        value = getattr(module, field)
        if is_array(value):
            name = type(module).__name__.removeprefix(_COMPILED)
            raise ValueError(
                f"nn.jit compiles a module's fields in as constants, and {field} of {name} is an "
                f"array, {short_repr(value)}. Give a number, or use jax.jit around the model, or "
                f"make the {name} inside the module that nn.jit compiles."
            )
