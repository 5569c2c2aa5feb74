"""The arguments and the result of a host of the table."""

from typing import Any, NamedTuple

import jax
from probes import seen


class Run(NamedTuple):
    """A host's result: a mask value `[time, batch, units]` for each site, and its last carry."""

    seen: dict[str, Any]
    carry: Any


class Window(NamedTuple):
    """The part of a sequence that a host is to run, and how much of it each row has."""

    carry: Any = None  # of the host's run before; None starts a sequence
    start: int = 0  # the index of the first step; a wrapper's carry knows it by itself
    seq_lengths: Any = None


WHOLE = Window()


def one_direction(carries: Any, ys: Any, direction: int) -> Run:
    """One of the two layers of a bidirectional host: 0 is forward, 1 backward."""
    # The backward layer's outputs, back in the order in which it ran.
    ys = jax.tree.map(lambda leaf: leaf[direction][:: (1, -1)[direction]], ys)
    return Run(seen(carries[direction].cell_carry, ys), carries[direction])
