"""Noise on the state: one noise for a whole state, and an error if values would explode.

An LSTM's c, a GRU's h and the h of the linear cells are leaky sums: the old value is multiplied by
a gate and carried on. Dropout divides a kept unit by keep_prob, and on a leaky sum it does so
again at every step: after 100 steps at 0.8, a kept unit is 5e9 times too large. So it is an error,
unless it is asked for by name: `state=(noise, None)` for an LSTM's c is applied.
"""

import dataclasses

import jax
from jax.tree_util import keystr

from ..cells import LSTMState
from ..cells.family import Family
from ..cells.known import list_cells_with
from ..noises.protocol import Noise, amplifies, is_identity
from .prefixes import structure_str, tree_str
from .recurrent_dropout import STATE, PyTree, RecurrentDropout, Site, active_noises


def resolve_state_noise(
    dropout: RecurrentDropout, carry: PyTree, family: Family | None, *, in_module: bool = False
) -> RecurrentDropout:
    """Resolves one noise for a whole state to the leaves it means; raises if values would explode.

    Args:
      dropout: the user's spec.
      carry: the cell's carry, or its shapes.
      family: the cell's family, if it is known.
      in_module: whether the cell is a Flax module; one noise for an LSTM's state is then for h.

    Returns:
      The spec, with a structure at `state` if it had one noise for an LSTM's state.

    Raises:
      ValueError: if the noise would make a value explode.
    """
    _check_leaky_sites(dropout, family)
    noise = dropout.state
    # Noises for c and h may be a plain pair or an LSTMState; so may the carry.
    if isinstance(carry, LSTMState) and type(noise) is tuple and len(noise) == 2:
        return dataclasses.replace(dropout, state=LSTMState(*noise))
    if type(carry) is tuple and isinstance(noise, LSTMState):
        if family is None or len(family.carried) != 2:
            raise ValueError(
                "dropout.state names c and h, but the carry is a plain pair of unknown order; "
                "Equinox carries (h, c). Write state=(None, noise) for the h of (c, h), "
                "state=(noise, None) for that of (h, c)."
            )
        state = tuple(noise.c if site.leaky else noise.h for site in family.carried)
        return dataclasses.replace(dropout, state=state)
    if not isinstance(noise, Noise) or is_identity(noise):
        return dropout
    # From here on it is one noise. TensorFlow's filter and Gal's paper put it on an LSTM's h alone.
    if isinstance(carry, LSTMState):
        return dataclasses.replace(dropout, state=LSTMState(None, noise))
    if family is not None and in_module and len(family.carried) > 1:
        state = tuple(None if site.leaky else noise for site in family.carried)
        return dataclasses.replace(dropout, state=state)
    # In a user's own cell there is no way to know which leaf is a memory.
    if len(jax.tree.leaves(carry)) > 1:
        raise ValueError(
            f"one noise for the whole state would reach every leaf of {structure_str(carry)}, so "
            f"the memory too. Say which leaves it is for, such as state={_noise_on_h(carry)}."
        )
    return dropout


def _noise_on_h(carry: PyTree) -> str:
    """A structure with noise on h, as it is written: fields `h`, or the second leaf of a pair."""
    keyed, structure = jax.tree_util.tree_flatten_with_path(carry)
    paths = [keystr(path) for path, _ in keyed]
    named = [path for path in paths if path.endswith((".h", "['h']"))]
    chosen = named or [path for path in paths if path.endswith("[1]")] or paths[-1:]
    return tree_str(structure, ["noise" if path in chosen else "None" for path in paths])


def _check_leaky_sites(dropout: RecurrentDropout, family: Family | None) -> None:
    """Raises if a noise that enlarges kept units is on a leaky sum."""
    # By its name, `memory` is a leaky sum in every cell.
    leaky = {Site("memory", inside=True): "the memory c, which a cell adds to"}
    if family is not None and all(site.leaky for site in family.carried):
        for site in (STATE, *(Site(site.name, inside=True) for site in family.carried)):
            leaky[site] = f"{family.name}'s h, which it carries on"
    for site, what in leaky.items():
        for noise in active_noises(site.of(dropout)):
            if amplifies(noise):
                raise ValueError(
                    f"dropout.{site}: {type(noise).__name__} would enlarge {what}, again at every "
                    f"step: the values would explode. {_ways_out(family)}"
                )


def _ways_out(family: Family | None) -> str:
    cell = None if family is None else family.cell
    if family is not None and cell is None:
        return "Use Dropout(.., scale=False), or Zoneout."
    if family is not None and not family.has("recurrent"):
        return "Use inside={'candidate': noise}, or Dropout(.., scale=False), or Zoneout."
    ours = list_cells_with("recurrent") if cell is None else cell.__name__
    return (
        f"Use inside={{'recurrent': noise}} on a cell that has that site, such as this library's "
        f"{ours}, or Dropout(.., scale=False), or Zoneout."
    )
