"""Short forms of values for error messages: never a page of weights or of a module's fields."""

from typing import Any

import jax
import numpy as np

# An error has five lines at most, so a value gets one, and a tree gets two.
_LONGEST = 80
_LONGEST_TREE = 200


def short_repr(value: Any) -> str:
    """A number, string or short tuple as written in Python; a dtype and shape; or a type's name.

    Control characters are escaped and long texts are cut, so that a message stays short for any
    value.
    """
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if value is None or isinstance(value, bool | int | float | str | np.generic):
        return shorten(ascii(value))
    if isinstance(value, tuple | list) and not hasattr(value, "_fields") and len(value) <= 8:
        entries = ", ".join(short_repr(entry) if _is_plain(entry) else "..." for entry in value)
        return shorten(f"[{entries}]" if isinstance(value, list) else f"({entries})")
    if isinstance(shape, tuple):
        return shorten(f"{dtype}{list(shape)}")
    if isinstance(value, type):
        return f"the class {name_as_written(value)}"
    # An nnx.Rngs has every attribute, each a stream.
    if callable(value) and isinstance(getattr(value, "__qualname__", None), str):
        return f"the function {name_as_written(value)}"
    return with_article(type(value).__name__)


def with_article(name: str) -> str:
    """A class's name behind `a` or `an`, as it is read: an LSTMCell, a GRUCell."""
    spelled = name[1:2].isupper() or name.startswith("Rng")  # letter by letter
    vowels = "AEFHILMNORSX" if spelled else "AEIOaeio"
    return f"an {name}" if name[:1] in tuple(vowels) else f"a {name}"


def must_be(name: str, wanted: str, got: Any) -> str:
    """The message for an argument of the wrong kind."""
    return f"{name} must be {wanted}, got {short_repr(got)}."


def short_tree_repr(tree: Any) -> str:
    """A tree with each leaf replaced by its dtype and shape."""
    if not jax.tree.leaves(tree):  # None, an empty tuple, or an object that is not a tree
        return short_repr(tree)
    text = repr(jax.tree.map(_Leaf, tree))
    return text if len(text) <= _LONGEST_TREE else f"{text[:_LONGEST_TREE]}..."


class _Leaf:
    def __init__(self, leaf: Any) -> None:
        self._text = short_repr(leaf)

    def __repr__(self) -> str:
        return self._text


def name_as_written(value: Any) -> str:
    """The module and name of a class or function, such as `flax.linen.recurrent:GRUCell`."""
    module, name = (getattr(value, key, None) for key in ("__module__", "__qualname__"))
    return shorten(ascii(f"{module}:{name}")[1:-1])


def shorten(text: str) -> str:
    """A text, with its middle left out if it is long."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST // 2]}...{text[-_LONGEST // 2 + 3 :]}"


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | np.generic)
