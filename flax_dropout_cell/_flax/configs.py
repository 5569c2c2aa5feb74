"""Configs: a wrapper's arguments as JSON can hold them."""

import importlib
import inspect
from typing import Any

import jax
import jax.numpy as jnp


def to_import_path(what: str, value: Any) -> str:
    """Names a module-level function or class as `module:qualname`.

    Raises:
      ValueError: it cannot be imported by that name, as a lambda cannot.
    """
    path = f"{getattr(value, '__module__', None)}:{getattr(value, '__qualname__', None)}"
    try:
        found = from_import_path(path)
    except (ImportError, AttributeError, ValueError):
        found = None
    if found is not value:
        raise ValueError(
            f"{what} {value!r} has no import path, and a config holds no code: "
            f"use a module-level function."
        )
    return path


def from_import_path(path: str) -> Any:
    """Finds what stands at `module:qualname`."""
    module, _, qualname = path.partition(":")
    found = importlib.import_module(module)
    for name in qualname.split("."):
        found = getattr(found, name)
    return found


def to_config(what: str, value: Any) -> Any:
    """Writes an argument of a cell as JSON can hold it."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [to_config(what, entry) for entry in value]
    try:
        return {"dtype": jnp.dtype(value).name}  # jnp.float32 and its like
    except TypeError:
        pass
    if callable(value):
        return {"import_path": to_import_path(what, value)}
    raise ValueError(f"{what} is {value!r}, which a config cannot hold.")


def from_config(value: Any) -> Any:
    """Reads what `to_config` wrote; a list comes back as a tuple."""
    if isinstance(value, list):
        return tuple(from_config(entry) for entry in value)
    if isinstance(value, dict) and value.keys() == {"dtype"}:
        return jnp.dtype(value["dtype"])
    if isinstance(value, dict) and value.keys() == {"import_path"}:
        return from_import_path(value["import_path"])
    return value


def keep_prob_to_config(name: str, keep_prob: Any) -> float:
    """A keep_prob as a number for JSON; a traced one is refused."""
    try:
        return float(keep_prob)
    except (TypeError, jax.errors.ConcretizationTypeError):
        raise ValueError(f"{name} is traced, and a config holds numbers.") from None


def arguments_from_config(config: dict[str, Any], **rngs: Any) -> dict[str, Any]:
    """The arguments that `get_config` wrote down."""
    visitor = config["dropout_state_filter_visitor"]
    return {
        **config,
        "cell": _cell_from_config(config["cell"], **rngs),
        "input_size": from_config(config["input_size"]),
        "dropout_state_filter_visitor": visitor and from_import_path(visitor),
        "broadcast_dims": tuple(config["broadcast_dims"]),
    }


def _cell_from_config(config: dict[str, Any], **rngs: Any) -> Any:
    cls = from_import_path(config["class_name"])
    make = getattr(cls, "from_config", None)
    takes = inspect.signature(make or cls.__init__).parameters
    rngs_taken = {name: value for name, value in rngs.items() if name in takes}
    if make is not None:
        return make(config["config"], **rngs_taken)
    for name, value in rngs_taken.items():
        if value is None and takes[name].default is inspect.Parameter.empty:
            raise ValueError(
                f"{cls.__name__} needs a key for its weights: pass {name}=nnx.Rngs(0) to "
                f"from_config."
            )
    arguments = {
        name: _cell_from_config(value, **rngs)
        if isinstance(value, dict) and value.keys() == {"class_name", "config"}
        else from_config(value)
        for name, value in config["config"].items()
    }
    return cls(**arguments, **rngs_taken)
