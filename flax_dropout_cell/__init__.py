"""Recurrent dropout for JAX: variational and per-step masks, for any cell of any framework.

The public names:

- The spec: `RecurrentDropout` assigns noises to sites; `Masks` holds drawn masks; `at_paths` and
  `recurrent_kernels` choose weights; `recipes` has published schemes.
- Noises: `Dropout`, `Zoneout`, `GaussianNoise`, `ConcreteDropout`; `Noise` is their protocol, and
  `register_noise` is for your own.
- Running a cell: `dropout_scan` over a sequence; `dropout_cell` for one step, with the masks of
  `draw_masks` and `draw_step_masks`; `Cell` is the type of a cell; `episode_ids` makes ids for
  rollouts.
- The loop: `scan` is a faster `jax.lax.scan` for any step; `explain_scan` gives a
  `ScanExplanation`, a table of the parts of a step that run before, in and after the loop.
- Cells: `lstm_cell` and `gru_cell`, with `init_lstm`, `init_gru`, `LSTMParams`, `GRUParams` and
  `LSTMState`; the linear `lru_cell`, `min_gru_cell`, `min_lstm_cell` and `rg_lru_cell`, with
  `init_lru`, `init_min_gru`, `init_min_lstm`, `init_rg_lru`, `LRUParams`, `MinGRUParams`,
  `MinLSTMParams` and `RGLRUParams`; `undisturbed` is for cells of your own with sites inside.
- Inspection: `describe` gives a `Description`, a table of sites, noises and masks; `plot_masks`
  plots masks.
- Training: `embedding_dropout` drops word types; `activation_regularization`,
  `temporal_activation_regularization`, `concrete_regularization` and `gaussian_kl` are terms for
  the loss.
- Uncertainty: `mc_samples` draws predictions; `mc_entropies` gives their `Entropies`.
- Flax: `linen` and `nnx` hold layers, wrappers and cells; they are imported when first used.
- Versions: `__version__`, and `RANDOM_STREAM`, the version of the masks that a key gives.

To read the source, start with docs/source.md, which follows one call. The packages, each of which
imports only those before it; `_arguments`, `_compat`, `_dtypes`, `_messages` and `_sharding` serve
all of them:

1. `_random`: the bits that a key gives.
2. `noises`: masks, how they are drawn and applied.
3. `cells`: equations, weights and sites inside; `cells/disturb.py` is all that a cell needs.
4. `_spec`: `RecurrentDropout` and its sites.
5. `_step`: one step of a cell, `dropout_cell`, and the masks of a sequence, `draw_masks`.
6. `_hoist`: a faster `jax.lax.scan`, which knows nothing of dropout.
7. `_sequence`: many steps, `dropout_scan`, with padding, resets and ids.
8. `recipes`: published schemes; `_inspect`: tables and pictures of masks; `_training`: embeddings,
   Monte Carlo and regularization.
9. `_flax`: the code that `linen` and `nnx` share, and the contract that they fulfil; these two
   hold the layers and wrappers that users import.

Importing this package does not import Flax.
"""

import importlib as _importlib
import importlib.metadata as _metadata
import types as _types
from typing import TYPE_CHECKING as _TYPE_CHECKING

from . import recipes as recipes
from ._hoist.scan import ScanExplanation as ScanExplanation
from ._hoist.scan import explain_scan as explain_scan
from ._hoist.scan import scan as scan
from ._inspect.describe import Description as Description
from ._inspect.describe import describe as describe
from ._inspect.plot_masks import plot_masks as plot_masks
from ._sequence.dropout_scan import dropout_scan as dropout_scan
from ._sequence.episode_ids import episode_ids as episode_ids
from ._sequence.step_masks import draw_step_masks as draw_step_masks
from ._spec.recurrent_dropout import Masks as Masks
from ._spec.recurrent_dropout import RecurrentDropout as RecurrentDropout
from ._spec.weight_paths import at_paths as at_paths
from ._spec.weight_paths import recurrent_kernels as recurrent_kernels
from ._step.call_cell import Cell as Cell
from ._step.draw_masks import draw_masks as draw_masks
from ._step.dropout_cell import dropout_cell as dropout_cell
from ._training.embedding import embedding_dropout as embedding_dropout
from ._training.monte_carlo import Entropies as Entropies
from ._training.monte_carlo import mc_entropies as mc_entropies
from ._training.monte_carlo import mc_samples as mc_samples
from ._training.regularization import activation_regularization as activation_regularization
from ._training.regularization import concrete_regularization as concrete_regularization
from ._training.regularization import gaussian_kl as gaussian_kl
from ._training.regularization import (
    temporal_activation_regularization as temporal_activation_regularization,
)
from .cells import GRUParams as GRUParams
from .cells import LRUParams as LRUParams
from .cells import LSTMParams as LSTMParams
from .cells import LSTMState as LSTMState
from .cells import MinGRUParams as MinGRUParams
from .cells import MinLSTMParams as MinLSTMParams
from .cells import RGLRUParams as RGLRUParams
from .cells import gru_cell as gru_cell
from .cells import init_gru as init_gru
from .cells import init_lru as init_lru
from .cells import init_lstm as init_lstm
from .cells import init_min_gru as init_min_gru
from .cells import init_min_lstm as init_min_lstm
from .cells import init_rg_lru as init_rg_lru
from .cells import lru_cell as lru_cell
from .cells import lstm_cell as lstm_cell
from .cells import min_gru_cell as min_gru_cell
from .cells import min_lstm_cell as min_lstm_cell
from .cells import rg_lru_cell as rg_lru_cell
from .cells.disturb import undisturbed as undisturbed
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


_IN_FLAX = (
    "RNN",
    "DropoutCell",
    "DropoutCarry",
    "RNNCellDropoutWrapper",
    "Embed",
    "LSTMCell",
    "GRUCell",
    "LRUCell",
    "MinGRUCell",
    "MinLSTMCell",
    "RGLRUCell",
    "cell_params",
    "core_params",
)


def __getattr__(name: str) -> object:
    if name in ("linen", "nnx"):
        return _importlib.import_module(f".{name}", __name__)
    if name in _IN_FLAX:
        raise AttributeError(f"{name} is for Flax: write fdc.linen.{name} or fdc.nnx.{name}.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    names = (
        name
        for name, value in globals().items()
        if not name.startswith("_") and not isinstance(value, _types.ModuleType)
    )
    return sorted([*names, "__version__", "linen", "nnx", "recipes"])
