"""How a value is shown in an error: short, never a page of weights or of a module's fields."""

from typing import Any

import jax
import numpy as np

_LONGEST = 80
_LONGEST_TREE = 200


def shown(value: Any) -> str:
    """A short value as it is written in Python; of others their kind, and an array's shape.

    Control characters come out escaped, and what is long is cut, so that a message stays short
    whatever came in.
    """
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if isinstance(value, int) and abs(value) >= 10**_LONGEST:
        return f"an int of {value.bit_length()} bits"
    if value is None or isinstance(value, bool | int | float | str | np.generic):
        return shorten(ascii(value))
    if isinstance(value, tuple | list) and len(value) <= 8:
        entries = ", ".join(shown(entry) if _is_plain(entry) else "..." for entry in value)
        return shorten(f"[{entries}]" if isinstance(value, list) else f"({entries})")
    if isinstance(shape, tuple):
        return shorten(f"{dtype}{list(shape)}")
    if isinstance(value, type):
        return f"the class {name_as_written(value)}"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"the function {name_as_written(value)}"
    return f"a {type(value).__name__}"


def shown_tree(tree: Any) -> str:
    """A tree with its leaves' dtypes and shapes in their places."""
    if not jax.tree.leaves(tree):
        return shown(tree)
    text = repr(jax.tree.map(_Leaf, tree))
    return text if len(text) <= _LONGEST_TREE else f"{text[:_LONGEST_TREE]}..."


class _Leaf:
    def __init__(self, leaf: Any) -> None:
        self._text = shown(leaf)

    def __repr__(self) -> str:
        return self._text


def name_as_written(value: Any) -> str:
    """Where a class or function says that it stands, such as `flax.linen.recurrent:GRUCell`."""
    module, name = (getattr(value, key, None) for key in ("__module__", "__qualname__"))
    return shorten(ascii(f"{module}:{name}")[1:-1])


def shorten(text: str) -> str:
    """A text without its middle where it is long."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST // 2]}...{text[-_LONGEST // 2 + 3 :]}"


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | np.generic)
