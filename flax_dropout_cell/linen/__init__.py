"""Recurrent dropout for Flax linen.

    rnn = fdc.linen.RNN(fdc.linen.LSTMCell(64), dropout)
    variables = rnn.init(params_key, x)
    y = rnn.apply(variables, x, rngs={"dropout": key})

- Layers: `RNN`, a cell over whole sequences; `Embed`, an embedding that drops word types.
- Wrappers, for Flax's own RNN layers and loops of your own: `DropoutCell`;
  `RNNCellDropoutWrapper`, with TensorFlow's arguments; `DropoutCarry`, the carry of both.
- Cells with sites inside: `LSTMCell`, `GRUCell`, and the linear `LRUCell`, `MinGRUCell`,
  `MinLSTMCell` and `RGLRUCell`.
- Weights: `cell_params` and `core_params`, to this module's cells and back.
"""

from .._flax.serialization import DropoutCarry as DropoutCarry
from .cells import GRUCell as GRUCell
from .cells import LSTMCell as LSTMCell
from .cells import cell_params as cell_params
from .cells import core_params as core_params
from .dropout_cell import DropoutCell as DropoutCell
from .embed import Embed as Embed
from .linear_cells import LRUCell as LRUCell
from .linear_cells import MinGRUCell as MinGRUCell
from .linear_cells import MinLSTMCell as MinLSTMCell
from .linear_cells import RGLRUCell as RGLRUCell
from .rnn import RNN as RNN
from .tensorflow import RNNCellDropoutWrapper as RNNCellDropoutWrapper

__all__ = [
    "RNN",
    "DropoutCarry",
    "DropoutCell",
    "Embed",
    "GRUCell",
    "LRUCell",
    "LSTMCell",
    "MinGRUCell",
    "MinLSTMCell",
    "RGLRUCell",
    "RNNCellDropoutWrapper",
    "cell_params",
    "core_params",
]


def __dir__() -> list[str]:
    return __all__
