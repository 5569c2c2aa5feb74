"""Configs: a wrapper's arguments in a form that JSON can hold.

A config is data, and reading one must not run code that the caller does not trust. So it is read
in three passes. First its text is checked, with every name in it. Then the names are looked up
among known and trusted objects, and the arguments are checked against the signatures of the
cells. Only then is anything constructed.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..._compat import is_traced
from ..._messages import short_repr, shorten
from .trusted_names import TrustedNames, check_name, find, find_cell_class, find_visitor, to_name

_DEEPEST, _LARGEST = 64, 10_000
_DTYPES = {
    np.dtype(scalar).name: np.dtype(scalar)
    for scalar in vars(jnp).values()
    if isinstance(scalar, type(jnp.float32))
}
# By identity, because NumPy gives any other class the dtype of objects.
_SCALAR_TYPES = {
    **{id(scalar): np.dtype(scalar) for scalar in (bool, int, float, complex)},
    **{id(dtype.type): dtype for dtype in _DTYPES.values()},
    **{id(getattr(jnp, name)): dtype for name, dtype in _DTYPES.items()},
}
_VISITOR = "dropout_state_filter_visitor"


def to_config(what: str, value: Any, names: TrustedNames) -> Any:
    """Writes an argument of a cell (not a cell or a list) in a form that JSON can hold.

    Raises:
      ValueError: if it has no such form.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    dtype = value if isinstance(value, np.dtype) else _SCALAR_TYPES.get(id(value))
    if dtype is not None and dtype.name in _DTYPES:
        return {"dtype": dtype.name}
    if callable(value):
        return {"import_path": to_name(what, value, names)}
    raise ValueError(f"{what} is {short_repr(value)}, which a config cannot hold.")


def keep_prob_to_config(name: str, keep_prob: Any) -> float:
    """A keep_prob as a number for JSON; raises if it is traced, or has several values."""
    if is_traced(keep_prob):
        raise ValueError(f"{name} is traced, and a config holds numbers.")
    if np.ndim(keep_prob):
        raise ValueError(
            f"{name} has shape {np.shape(keep_prob)}, and a config holds one number for it."
        )
    return float(keep_prob)


def plan_wrapper(
    config: Any, wrapper: type, names: TrustedNames, **rngs: Any
) -> tuple[dict[str, Any], Callable[[], Any]]:
    """The arguments in a wrapper's config, and a function that makes its cell.

    Args:
      config: a config, unchecked.
      wrapper: the wrapper's class.
      names: the names that the config may use.
      **rngs: passed to the cells that take them.

    Raises:
      ValueError: if the config is not a wrapper's, or uses a name that is neither known nor
        trusted.
    """
    check_data(config, names)
    if not isinstance(config, dict):
        raise ValueError(f"config must be a dict that get_config gave, got {short_repr(config)}.")
    _check_arguments("config", config, _parameters_of(wrapper, names))
    _check_types(config)
    arguments = {
        name: value
        for name, value in config.items()
        if name not in ("cell", "input_size", "broadcast_dims", _VISITOR)
    }
    for name in {"input_size", "broadcast_dims"} & config.keys():
        arguments[name] = _as_tuples(config[name])
    if config.get(_VISITOR) is not None:
        path = config[_VISITOR]["import_path"]
        arguments[_VISITOR] = find_visitor(f"config.{_VISITOR}", path, names)
    return arguments, _plan_cell("config.cell", config["cell"], names, rngs)


def check_data(config: Any, names: TrustedNames) -> None:
    """Raises, before any import, if a config is not plain data or names what it may not."""
    # A loop, not a recursion: a config may be nested so deeply that Python's stack overflows.
    todo, count = [("config", config, 0)], 0
    while todo:
        where, node, depth = todo.pop()
        count += 1
        if isinstance(node, dict | list | tuple):
            count += len(node)
            if depth >= _DEEPEST or count > _LARGEST:
                raise ValueError(
                    f"the config does not describe a wrapper: it is nested more than {_DEEPEST} "
                    f"deep, or has more than {_LARGEST} entries."
                )
        if isinstance(node, dict):
            _check_names(where, node, names)
            todo += [(_at(where, key), entry, depth + 1) for key, entry in node.items()]
        elif isinstance(node, list | tuple):
            todo += [(f"{where}[{index}]", entry, depth + 1) for index, entry in enumerate(node)]
        elif node is not None and not isinstance(node, bool | int | float | str):
            raise ValueError(
                f"{shorten(where)} is {short_repr(node)}, and a config holds what JSON can: dicts, "
                f"lists, strings, numbers, bools and None."
            )


def _check_names(where: str, node: dict[Any, Any], names: TrustedNames) -> None:
    if node.keys() == {"class_name", "config"}:
        check_name(shorten(f"{where}.class_name"), node["class_name"], names)
    elif node.keys() == {"import_path"}:
        check_name(shorten(where), node["import_path"], names)
    elif node.keys() == {"dtype"} and (
        not isinstance(node["dtype"], str) or node["dtype"] not in _DTYPES
    ):
        raise ValueError(
            f"{shorten(where)} must name a dtype of jax.numpy, got {short_repr(node['dtype'])}."
        )


def _at(where: str, key: Any) -> str:
    if not isinstance(key, str):
        raise ValueError(f"{shorten(where)} has the key {short_repr(key)}; keys are strings.")
    return f"{where}.{key}" if key.isidentifier() and key.isascii() else f"{where}[{key!a}]"


def _check_arguments(
    where: str, given: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]
) -> None:
    unknown = given.keys() - parameters.keys()
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and name not in given
    ]
    if unknown or missing:
        problem, which = ("takes no", unknown) if unknown else ("needs", missing)
        raise ValueError(
            f"{shorten(where)} {problem} {short_repr(min(which))}; its arguments are "
            f"{', '.join(list(parameters)[:20])}."
        )


def _check_types(config: dict[str, Any]) -> None:
    """Raises if an argument that the wrapper itself does not check has the wrong type."""

    def check(name: str, is_right: Callable[[Any], bool], wanted: str) -> None:
        if name in config and not is_right(config[name]):
            raise ValueError(f"config.{name} must be {wanted}, got {short_repr(config[name])}.")

    for name in ("variational_recurrent", "deterministic"):
        check(name, lambda value: isinstance(value, bool), "true or false")
    check("dtype", lambda value: value is None or _is_dtype(value), "a dtype's name or None")
    check("input_size", lambda value: value is None or _are_ints(value), "ints or None")
    check(
        "broadcast_dims",
        lambda value: isinstance(value, list | tuple) and _are_ints(value),
        "a list of ints",
    )
    check(
        _VISITOR,
        lambda value: (
            value is None or (isinstance(value, dict) and value.keys() == {"import_path"})
        ),
        "{'import_path': a name} or None",
    )


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and value in _DTYPES


def _are_ints(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_are_ints(entry) for entry in value)
    return type(value) is int


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


def _plan_cell(
    where: str, config: Any, names: TrustedNames, rngs: dict[str, Any]
) -> Callable[[], Any]:
    """Checks a cell's config; returns a function that makes the cell."""
    if not (isinstance(config, dict) and config.keys() == {"class_name", "config"}):
        raise ValueError(
            f"{shorten(where)} must have a class_name and a config, got {short_repr(config)}."
        )
    cls: Any = find_cell_class(shorten(f"{where}.class_name"), config["class_name"], names)
    if hasattr(cls, "from_config"):
        takes = inspect.signature(cls.from_config).parameters
        given = {**rngs, "trusted": names.trusted}
        taken = {name: value for name, value in given.items() if name in takes}
        return functools.partial(cls.from_config, config["config"], **taken)
    where = f"{where}.config"
    if not isinstance(config["config"], dict):
        raise ValueError(
            f"{shorten(where)} must be a dict of arguments, got {short_repr(config['config'])}."
        )
    _check_arguments(where, config["config"], _parameters_of(cls, names))
    takes = inspect.signature(cls.__init__).parameters
    taken = {name: value for name, value in rngs.items() if name in takes}
    for name, value in taken.items():
        if value is None and takes[name].default is inspect.Parameter.empty:
            raise ValueError(
                f"{cls.__name__} needs a key for its weights: pass {name}=nnx.Rngs(0) to "
                f"from_config."
            )
    plans = {
        name: _plan_argument(_at(where, name), value, names, rngs)
        for name, value in config["config"].items()
    }

    def make_cell() -> Any:
        arguments = {name: make() for name, make in plans.items()}
        # A config is not the caller's code, so its mistakes are a ValueError, as JSON's are.
        try:
            return cls(**arguments, **taken)
        except (TypeError, ValueError) as error:
            reason = shorten(str(error).partition("\n")[0])
            raise ValueError(f"{shorten(where)} makes no {cls.__name__}: {reason}") from error

    return make_cell


def _plan_argument(
    where: str, value: Any, names: TrustedNames, rngs: dict[str, Any]
) -> Callable[[], Any]:
    """Checks a cell's argument; returns a function that makes it. Lists become tuples."""
    if isinstance(value, list | tuple):
        plans = [
            _plan_argument(f"{where}[{index}]", entry, names, rngs)
            for index, entry in enumerate(value)
        ]
        return lambda: tuple(make() for make in plans)
    if not isinstance(value, dict):
        return lambda: value
    if value.keys() == {"class_name", "config"}:
        return _plan_cell(where, value, names, rngs)
    if value.keys() == {"dtype"}:
        return lambda: _DTYPES[value["dtype"]]
    if value.keys() == {"import_path"}:
        found = find(shorten(where), value["import_path"], names)
        return lambda: found
    raise ValueError(
        f"{shorten(where)} is a dict that describes neither a cell, a dtype nor a function: "
        f"{{'class_name', 'config'}}, {{'dtype'}} or {{'import_path'}}."
    )


def _parameters_of(cls: type, names: TrustedNames) -> dict[str, inspect.Parameter]:
    """The parameters of a cell's constructor that a config can hold."""
    return {
        parameter.name: parameter
        for parameter in constructor_parameters(cls)
        if parameter.name not in names.left_out
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def constructor_parameters(cls: type) -> Iterator[inspect.Parameter]:
    """The parameters of a class's constructor; this library's cells pass `**options` to Flax's."""
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        # Flax's metaclass hides a class's own signature behind (*args, **kwargs).
        _, *parameters = inspect.signature(base.__init__).parameters.values()
        yield from parameters
        if not base.__module__.startswith("flax_dropout_cell."):
            return
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            return
