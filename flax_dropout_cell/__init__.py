"""Recurrent dropout for JAX: any cell, any framework, masks that are drawn where they belong.

Read the files in this order: `noises` (what is drawn), `_sites.py` (where it sits),
`_step.py` (one step), `_scan.py` (a sequence). `linen` and `nnx` put the same
step into Flax cells; importing this package does not import Flax.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from ._scan import dropout_scan as dropout_scan
from ._sites import Masks as Masks
from ._sites import RecurrentDropout as RecurrentDropout
from ._step import Cell as Cell
from ._step import draw_masks as draw_masks
from ._step import dropout_cell as dropout_cell
from .noises import Dropout as Dropout
from .noises import Noise as Noise

if TYPE_CHECKING:
    from . import linen as linen
    from . import nnx as nnx

__version__ = importlib.metadata.version("flax_dropout_cell")


def __getattr__(name: str) -> Any:
    if name in ("linen", "nnx"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
