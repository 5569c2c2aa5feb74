"""This library's own cells: pure functions on plain arrays, with sites inside for noise."""

from .gru import GRUParams as GRUParams
from .gru import gru_cell as gru_cell
from .gru import init_gru as init_gru
from .lstm import LSTMParams as LSTMParams
from .lstm import LSTMState as LSTMState
from .lstm import init_lstm as init_lstm
from .lstm import lstm_cell as lstm_cell
