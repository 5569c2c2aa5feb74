"""The LSTM."""

from typing import Any, NamedTuple


class LSTMState(NamedTuple):
    """An LSTM's carry: its memory c and what it emits, h."""

    c: Any
    h: Any
