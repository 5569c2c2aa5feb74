"""Names in configs: what a config may name, and how it is found without running anything else."""

import dataclasses
import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.nn.initializers
import jax.numpy as jnp

from .._shown import shorten, shown

# Functions of arrays that read and write nothing. Modules as a whole are not to be trusted:
# jax.numpy has load and fromfile, jax has pure_callback.
_FUNCTIONS = {
    jax.nn: """relu relu6 sigmoid softplus sparse_plus sparse_sigmoid soft_sign silu swish
        log_sigmoid leaky_relu hard_sigmoid hard_silu hard_swish hard_tanh elu celu selu gelu glu
        squareplus mish identity softmax log_softmax standardize log1mexp tanh""",
    jnp: """tanh sin cos tan sinh cosh arcsinh arctan sinc exp exp2 expm1 log1p abs sign square
        sqrt cbrt positive negative""",
    jax.lax: "tanh logistic sin cos exp erf abs sign square",
    jax.nn.initializers: "zeros ones",
}
KNOWN_FUNCTIONS = {
    f"{module.__name__}:{name}": getattr(module, name)
    for module, names in _FUNCTIONS.items()
    for name in names.split()
    if hasattr(module, name)  # JAX has more of them from version to version
}
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:(?!__)[A-Za-z_]\w*", re.ASCII)
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Names:
    """What a config may name, as `module:name`.

    Attributes:
      cell_class: the framework's cell class; a cell's class must be a subclass of it.
      left_out: arguments of cells that are no part of a config.
      known: what needs no trust: this framework's cells, and functions of arrays.
      trusted: modules in which the caller trusts all that is defined in them.
    """

    cell_class: type
    left_out: tuple[str, ...]
    known: Mapping[str, Any]
    trusted: tuple[str, ...]


def collect_names(
    cell_class: type, modules: Sequence[str], left_out: Sequence[str], trusted: Any = ()
) -> Names:
    """The cells that the public `modules` export, known functions, and what the caller trusts.

    Raises:
      TypeError: `trusted` is no sequence of modules' names.
    """
    if not isinstance(trusted, Sequence) or isinstance(trusted, str):
        raise TypeError(
            f"trusted must be a sequence of modules' names such as ('my_project',), "
            f"got {shown(trusted)}."
        )
    for module in trusted:
        if not (isinstance(module, str) and _MODULE.fullmatch(module)):
            raise TypeError(
                f"trusted must hold modules' names such as 'my_project', got {shown(module)}."
            )
    cells = {
        f"{module}:{name}": value
        for module in modules
        for name, value in vars(sys.modules[module]).items()
        if isinstance(value, type) and issubclass(value, cell_class) and value is not cell_class
    }
    return Names(cell_class, tuple(left_out), {**cells, **KNOWN_FUNCTIONS}, tuple(trusted))


def to_name(what: str, value: Any, names: Names) -> str:
    """Names a known object, or one that is defined at the top of a module.

    Raises:
      ValueError: it has no such name, as a lambda has none.
    """
    for name, known in names.known.items():
        if known is value:
            return name
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if vars(sys.modules.get(str(module), object)).get(str(name)) is not value:
        raise ValueError(
            f"{what} is {shown(value)}, which has no import path, and a config holds no code: "
            f"use a module-level function or class."
        )
    return f"{module}:{name}"


def check_name(where: str, name: Any, names: Names) -> None:
    """Refuses, by its text alone, a name that is neither known nor in a trusted module.

    Raises:
      ValueError: it is such a name, or none at all.
    """
    if not (isinstance(name, str) and len(name) < 500 and _NAME.fullmatch(name)):
        raise ValueError(
            f"{where} must be a name such as 'flax.linen:LSTMCell', got {shown(name)}."
        )
    module, _, _ = name.partition(":")
    if name in names.known or any(f"{module}.".startswith(f"{root}.") for root in names.trusted):
        return
    raise ValueError(
        f"{where} names {shorten(name)}, and nothing of it was run: it is no cell of "
        f"{'.'.join(names.cell_class.__module__.split('.')[:2])} or of this library, no activation "
        f"function or initializer of jax, and in no trusted module "
        f"({shorten(', '.join(names.trusted)) or 'none were given'}). "
        f"If it is code of your own, pass trusted=('my_project',)."
    )


def find(where: str, name: str, names: Names) -> Any:
    """What a checked name stands for; a module is imported only where it is a trusted one.

    Raises:
      ValueError: nothing is defined there by that name, or a class that is no cell's.
    """
    if name in names.known:
        return names.known[name]
    module, _, attribute = name.partition(":")
    try:
        found = vars(importlib.import_module(module)).get(attribute)
    except ImportError as error:
        raise ValueError(
            f"{where} names {shorten(name)}, and {shorten(module)} cannot be imported."
        ) from error
    own_name = f"{getattr(found, '__module__', '')}:{getattr(found, '__qualname__', '')}"
    if not callable(found) or own_name != name:
        raise ValueError(
            f"{where} names {shorten(name)}, and no function or class of that name is defined in "
            f"{shorten(module)}; what a module has imported from elsewhere does not count."
        )
    if isinstance(found, type) and not issubclass(found, names.cell_class):
        raise ValueError(
            f"{where} names the class {shorten(name)}, which is no {names.cell_class.__name__} of "
            f"{names.cell_class.__module__}."
        )
    return found


def find_cell_class(where: str, name: str, names: Names) -> type:
    """The cell class that a checked name stands for."""
    found = find(where, name, names)
    if not isinstance(found, type):
        raise ValueError(f"{where} names {shorten(name)}, which is no cell's class.")
    return found


def find_visitor(where: str, name: str, names: Names) -> Any:
    """The state filter visitor that a checked name stands for: a function of the caller's own."""
    found = find(where, name, names)
    if name in names.known or isinstance(found, type):
        raise ValueError(f"{where} names {shorten(name)}, which is no state filter visitor.")
    return found
