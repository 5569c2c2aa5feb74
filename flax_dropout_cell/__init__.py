"""Recurrent dropout for JAX: any cell, any framework, masks that are drawn where they belong.

Read the files in this order: `_noise.py` (what is drawn), `_spec.py` (where it sits),
`_dropout_cell.py` (one step), `_dropout_scan.py` (a sequence). `linen` and `nnx` put the same
step into Flax cells; importing this package does not import Flax.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from ._dropout_cell import Cell as Cell
from ._dropout_cell import draw_masks as draw_masks
from ._dropout_cell import dropout_cell as dropout_cell
from ._dropout_scan import dropout_scan as dropout_scan
from ._noise import Dropout as Dropout
from ._noise import Noise as Noise
from ._spec import Masks as Masks
from ._spec import RecurrentDropout as RecurrentDropout

if TYPE_CHECKING:
    from . import linen as linen
    from . import nnx as nnx

__version__ = importlib.metadata.version("flax_dropout_cell")


def __getattr__(name: str) -> Any:
    if name in ("linen", "nnx"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
