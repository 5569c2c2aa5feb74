"""Names in configs: which are allowed, and how they are looked up without running other code."""

import dataclasses
import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.nn.initializers
import jax.numpy as jnp

from ..._messages import must_be, short_repr, shorten

# Pure functions of arrays. Whole modules cannot be trusted: jax.numpy has load and fromfile, and
# jax has pure_callback.
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
class TrustedNames:
    """The names that a config may use, as `module:name`.

    Attributes:
      cell_class: the framework's cell class; a cell's class must be a subclass of it.
      left_out: arguments of cells that are not part of a config.
      known: the framework's cells and pure functions of arrays; they need no trust.
      trusted: modules that the caller trusts: everything defined in them may be named.
    """

    cell_class: type
    left_out: tuple[str, ...]
    known: Mapping[str, Any]
    trusted: tuple[str, ...]


def collect_names(
    cell_class: type, modules: Sequence[str], left_out: Sequence[str], trusted: Any = ()
) -> TrustedNames:
    """The cells that the public `modules` export, the known functions, and the trusted modules.

    Raises:
      TypeError: if `trusted` is not a sequence of module names.
    """
    if not isinstance(trusted, Sequence) or isinstance(trusted, str):
        raise TypeError(must_be("trusted", "a sequence of modules' names", trusted))
    for module in trusted:
        if not (isinstance(module, str) and _MODULE.fullmatch(module)):
            wanted = "modules' names such as 'my_project'"
            raise TypeError(f"trusted must hold {wanted}, got {short_repr(module)}.")
    cells = {
        f"{module}:{name}": value
        for module in modules
        for name, value in vars(sys.modules[module]).items()
        if isinstance(value, type) and issubclass(value, cell_class) and value is not cell_class
    }
    return TrustedNames(cell_class, tuple(left_out), {**cells, **KNOWN_FUNCTIONS}, tuple(trusted))


def to_name(what: str, value: Any, names: TrustedNames) -> str:
    """The name of a known object, or of one that is defined at the top level of a module.

    Raises:
      ValueError: if it has no such name; a lambda has none.
    """
    for name, known in names.known.items():
        if known is value:
            return name
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if vars(sys.modules.get(str(module), object)).get(str(name)) is not value:
        raise ValueError(
            f"{what} is {short_repr(value)}, which has no import path, and a config holds no code: "
            f"use a module-level function or class."
        )
    return f"{module}:{name}"


def check_name(where: str, name: Any, names: TrustedNames) -> None:
    """Raises if a name is neither known nor in a trusted module; looks at its text alone.

    Raises:
      ValueError: if it is not a name, or not an allowed one.
    """
    if not (isinstance(name, str) and len(name) < 500 and _NAME.fullmatch(name)):
        raise ValueError(must_be(where, "a name such as 'flax.linen:LSTMCell'", name))
    module, _, _ = name.partition(":")
    if name in names.known or any(f"{module}.".startswith(f"{root}.") for root in names.trusted):
        return
    raise ValueError(
        f"{where} names {shorten(name)}, which was not run: it is not a cell of "
        f"{'.'.join(names.cell_class.__module__.split('.')[:2])} or of this library, not an "
        f"activation function or initializer of jax, and not in a trusted module "
        f"({shorten(', '.join(names.trusted)) or 'none were given'}). "
        f"If it is code of your own, pass trusted=('my_project',)."
    )


def find(where: str, name: str, names: TrustedNames) -> Any:
    """The object that a checked name stands for; only a trusted module is imported.

    Raises:
      ValueError: if the module does not define it, or it is a class but not a cell's.
    """
    if name in names.known:
        return names.known[name]
    module, _, attribute = name.partition(":")
    # Of the module's own names only: a.b.c would walk through its imports, to os.system.
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
            f"{shorten(module)}; a module's imports from elsewhere do not count."
        )
    if isinstance(found, type) and not issubclass(found, names.cell_class):
        raise ValueError(
            f"{where} names the class {shorten(name)}, which is not a "
            f"{names.cell_class.__name__} of {names.cell_class.__module__}."
        )
    return found


def find_cell_class(where: str, name: str, names: TrustedNames) -> type:
    """The cell class that a checked name stands for."""
    found = find(where, name, names)
    if not isinstance(found, type):
        raise ValueError(f"{where} names {shorten(name)}, which is not a cell's class.")
    return found


def find_visitor(where: str, name: str, names: TrustedNames) -> Any:
    """The state filter visitor that a checked name stands for: a function of the caller's own."""
    found = find(where, name, names)
    if name in names.known or isinstance(found, type):
        raise ValueError(f"{where} names {shorten(name)}, which is not a state filter visitor.")
    return found
