"""Recurrent dropout for JAX: variational and per-step masks, for any cell of any framework.

Read the files in this order: `noises` (what is drawn), `_sites.py` (where it sits),
`_step.py` (one step), `_scan.py` (a sequence). `linen` and `nnx` put the same
step into Flax cells; importing this package does not import Flax.
"""

import importlib as _importlib
import importlib.metadata as _metadata
from typing import TYPE_CHECKING as _TYPE_CHECKING

from . import recipes as recipes
from ._describe import Description as Description
from ._describe import describe as describe
from ._embedding import embedding_dropout as embedding_dropout
from ._inside import Cell as Cell
from ._inside import undisturbed as undisturbed
from ._monte_carlo import Entropies as Entropies
from ._monte_carlo import mc_entropies as mc_entropies
from ._monte_carlo import mc_samples as mc_samples
from ._paths import at_paths as at_paths
from ._paths import recurrent_kernels as recurrent_kernels
from ._plot_masks import plot_masks as plot_masks
from ._regularization import activation_regularization as activation_regularization
from ._regularization import concrete_regularization as concrete_regularization
from ._regularization import (
    temporal_activation_regularization as temporal_activation_regularization,
)
from ._scan import dropout_scan as dropout_scan
from ._sites import Masks as Masks
from ._sites import RecurrentDropout as RecurrentDropout
from ._step import draw_masks as draw_masks
from ._step import dropout_cell as dropout_cell
from .cells import GRUParams as GRUParams
from .cells import LSTMParams as LSTMParams
from .cells import LSTMState as LSTMState
from .cells import gru_cell as gru_cell
from .cells import init_gru as init_gru
from .cells import init_lstm as init_lstm
from .cells import lstm_cell as lstm_cell
from .noises import ConcreteDropout as ConcreteDropout
from .noises import Dropout as Dropout
from .noises import GaussianNoise as GaussianNoise
from .noises import Noise as Noise
from .noises import Zoneout as Zoneout
from .noises import register_noise as register_noise

if _TYPE_CHECKING:
    from . import linen as linen
    from . import nnx as nnx

__version__ = _metadata.version("flax_dropout_cell")

RANDOM_STREAM = 1
"""The version of the random stream: while it stays, a key's masks stay."""


def __getattr__(name: str) -> object:
    if name in ("linen", "nnx"):
        return _importlib.import_module(f".{name}", __name__)
    if name in ("RNN", "LSTMCell", "GRUCell", "Embed", "DropoutCell", "RNNCellDropoutWrapper"):
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}: it is for Flax, so write "
            f"fdc.linen.{name} or fdc.nnx.{name}."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
