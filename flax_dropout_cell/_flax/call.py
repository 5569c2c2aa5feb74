"""Arguments of a call that win over a module's own."""

from typing import Any


def call_or_default(given: Any, own: Any) -> Any:
    """The argument of the call, or the module's own if it is None."""
    return own if given is None else given
