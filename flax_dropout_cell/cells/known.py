"""All families of cells that this library knows, and how to find the family of a cell."""

import functools
from typing import Any

from .family import Family
from .gru import GRU, MGU
from .lru import LRU
from .lstm import LSTM
from .min_gru import MIN_GRU
from .min_lstm import MIN_LSTM
from .rg_lru import RG_LRU

FAMILIES = (LSTM, GRU, MGU, LRU, MIN_GRU, MIN_LSTM, RG_LRU)

# A user's own LSTMCell may carry its values in another order, so its name alone says nothing.
_ROOTS = ("flax", __name__.split(".")[0])


def family_of(cell: Any) -> Family | None:
    """The family of a pure cell, or of a Flax module whose method it is; None if it is unknown."""
    while True:
        module_family = family_of_module(getattr(cell, "__self__", None))
        known = [family for family in FAMILIES if family.cell and family.cell is cell]
        if module_family or known:
            return module_family or known[0]
        if isinstance(cell, functools.partial):
            cell = cell.func
        elif hasattr(cell, "__wrapped__"):  # jax.jit of a cell, for one
            cell = cell.__wrapped__
        else:
            return None


def family_of_module(module: Any) -> Family | None:
    """The family of a Flax module, which may be of a subclass; found without importing Flax."""
    for base in type(module).__mro__:
        if base.__module__.split(".")[0] in _ROOTS:
            for family in FAMILIES:
                if base.__name__ in family.modules:
                    return family
    return None


def list_cells_with(site: str) -> str:
    """This library's cells that have a site, as a message lists them; "" if none has."""
    names = [family.cell.__name__ for family in FAMILIES if family.cell and family.has(site)]
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
