"""This library's cells: equations, weights, sites inside."""

from .lstm import LSTMState as LSTMState
