"""This library's own cells: pure functions on plain arrays, with sites inside for noise."""

from .gru import GRUParams as GRUParams
from .gru import gru_cell as gru_cell
from .gru import init_gru as init_gru
from .lru import LRUParams as LRUParams
from .lru import init_lru as init_lru
from .lru import lru_cell as lru_cell
from .lstm import LSTMParams as LSTMParams
from .lstm import LSTMState as LSTMState
from .lstm import init_lstm as init_lstm
from .lstm import lstm_cell as lstm_cell
from .min_gru import MinGRUParams as MinGRUParams
from .min_gru import init_min_gru as init_min_gru
from .min_gru import min_gru_cell as min_gru_cell
from .min_lstm import MinLSTMParams as MinLSTMParams
from .min_lstm import init_min_lstm as init_min_lstm
from .min_lstm import min_lstm_cell as min_lstm_cell
from .rg_lru import RGLRUParams as RGLRUParams
from .rg_lru import init_rg_lru as init_rg_lru
from .rg_lru import rg_lru_cell as rg_lru_cell
