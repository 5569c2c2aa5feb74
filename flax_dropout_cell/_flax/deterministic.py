"""Whether a module evaluates: its own setting, or the argument of the call."""

from typing import Any

import numpy as np

from .._messages import must_be


def evaluates(given: Any, own: Any) -> bool:
    """Whether a call evaluates: by its argument, or by the module's own setting if that is None."""
    return check_deterministic(own if given is None else given)


def check_deterministic(deterministic: Any) -> bool:
    """The setting as a bool; raises if it is not one.

    An `nnx.Rngs` in its place would be true, and the dropout off for the whole training.
    """
    if isinstance(deterministic, bool | np.bool_):
        return bool(deterministic)
    raise TypeError(must_be("deterministic", "True or False", deterministic))
