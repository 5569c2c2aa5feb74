"""Whether a module evaluates or draws: its own setting, or the argument of the call."""

from typing import Any

from .._arguments import check_flag
from .._spec.recurrent_dropout import RecurrentDropout, active_noises


def is_evaluation(given: Any, own: Any) -> bool:
    """Whether a call evaluates: by its argument, or by the module's own setting if that is None."""
    # An nnx.Rngs in its place would be true, and the dropout off for the whole training.
    return check_flag("deterministic", own if given is None else given)


def needs_key(dropout: RecurrentDropout, given: Any, own: Any) -> bool:
    """Whether a call needs a key: it trains, and some noise does something."""
    return not is_evaluation(given, own) and bool(active_noises(dropout))
