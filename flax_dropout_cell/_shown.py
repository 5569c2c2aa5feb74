"""How a value is shown in an error: short, never a page of weights or of a module's fields."""

from typing import Any


def shown(value: Any) -> str:
    """A value's repr where it fits into a line, else its type."""
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else f"a {type(value).__name__}"
