"""Recurrent dropout around Flax linen cells, in the stock `nn.RNN`, `nn.Bidirectional`, `nn.scan`.

    rnn = nn.RNN(DropoutCell(nn.LSTMCell(64), dropout))
    variables = rnn.init(params_key, x)
    y = rnn.apply(variables, x, rngs={"dropout": key})

Hosts call `initialize_carry` before their loop: the variational masks are drawn there, once, and
ride in the carry, with the key that each step derives its own from.
"""

from .._flax.carry import DropoutCarry as DropoutCarry
from .cells import GRUCell as GRUCell
from .cells import LSTMCell as LSTMCell
from .cells import cell_params as cell_params
from .cells import core_params as core_params
from .dropout_cell import DropoutCell as DropoutCell
from .embed import Embed as Embed
from .rnn import RNN as RNN
from .tensorflow import RNNCellDropoutWrapper as RNNCellDropoutWrapper
