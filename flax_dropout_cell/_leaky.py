"""What explodes: noise on values that a cell adds to from step to step.

An LSTM's memory c and a GRU's h are leaky sums: what stands there is carried on, times a gate.
Dropout divides what it keeps by keep_prob, and at such a place it does so again at every step:
after 100 steps at 0.8, a kept unit is 1e9 times too large. So this is refused, at every entry.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax

from ._sites import PyTree, RecurrentDropout, Site, active_noises
from ._trees import outline
from .cells import LSTMState
from .noises.protocol import Noise, is_identity, scales

Family = Literal["lstm", "gru"] | None

_GRUS = ("GRUCell", "MGUCell")
_WAYS_OUT = (
    "Use inside={'recurrent': noise} on a cell that has that site, such as this library's "
    "gru_cell, or Dropout(.., scale=False), or Zoneout."
)


def place_state(dropout: RecurrentDropout, carry: PyTree, family: Family) -> RecurrentDropout:
    """Places one noise for a whole state on what it means there, or refuses what explodes.

    Args:
      dropout: what the user wrote.
      carry: the cell's carry, or its shapes.
      family: "lstm" where one noise means the h of a plain `(c, h)`; "gru" where h is carried on
        times a gate; None where the cell is not known.

    Returns:
      The spec, with a structure at `state` where one noise stood for an LSTM's state.

    Raises:
      ValueError: the noise would reach a value that it makes explode.
    """
    _refuse_scaling(dropout, Site("memory", inside=True), "the memory c, which a cell adds to")
    if family == "gru":
        for site in (Site("state"), Site("hidden", inside=True)):
            _refuse_scaling(dropout, site, "a GRU's h, which it carries on")
    noise = dropout.state
    # A pair of noises is for c and h, whichever way the pair and the carry are written.
    if isinstance(carry, LSTMState) and type(noise) is tuple and len(noise) == 2:
        return dataclasses.replace(dropout, state=LSTMState(*noise))
    if type(carry) is tuple and isinstance(noise, LSTMState):
        return dataclasses.replace(dropout, state=tuple(noise))
    if not isinstance(noise, Noise) or is_identity(noise):
        return dropout
    if isinstance(carry, LSTMState):
        return dataclasses.replace(dropout, state=LSTMState(None, noise))
    if family == "lstm":
        return dataclasses.replace(dropout, state=(None, noise))
    if len(jax.tree.leaves(carry)) > 1:
        raise ValueError(
            f"one noise for the whole state would reach every leaf of {outline(carry)}, a memory "
            f"that explodes under it too. Say which leaves it is for: state=(None, noise) is the h "
            f"of an LSTM's (c, h)."
        )
    return dropout


def _refuse_scaling(dropout: RecurrentDropout, site: Site, what: str) -> None:
    for noise in active_noises(site.of(dropout)):
        if scales(noise):
            raise ValueError(
                f"dropout.{site}: {type(noise).__name__} makes what it keeps larger, at every step "
                f"again, for it sits on {what}: the values would explode. {_WAYS_OUT}"
            )


def family_of(cell: Any) -> Family:
    """What is known of a cell from the outside: "gru" for this library's and Flax's GRUs."""
    while isinstance(cell, functools.partial):
        cell = cell.func
    module = getattr(cell, "__module__", "") or ""
    if module == f"{__package__}.cells.gru":
        return "gru"
    return "gru" if is_flax_gru(getattr(cell, "__self__", None)) else None


def is_flax_gru(module: Any) -> bool:
    """Whether a Flax module is of the GRU family, without importing Flax."""
    return any(
        base.__name__ in _GRUS and base.__module__.split(".")[0] in ("flax", __package__)
        for base in type(module).__mro__
    )
