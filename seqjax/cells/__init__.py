"""One recurrence a file, each a frozen dataclass of pure functions."""

from seqjax.cells.base import Cell, Layer
from seqjax.cells.gated import GatedCell, GatedParams
from seqjax.cells.gru import GRUCell, GRUParams
from seqjax.cells.lstm import LSTMCarry, LSTMCell, LSTMParams
from seqjax.cells.rnn import RNNCell, RNNParams

__all__ = [
    "Cell",
    "GRUCell",
    "GRUParams",
    "GatedCell",
    "GatedParams",
    "LSTMCarry",
    "LSTMCell",
    "LSTMParams",
    "Layer",
    "RNNCell",
    "RNNParams",
]
__dir__ = __all__.copy  # What dir() and tab completion show.
