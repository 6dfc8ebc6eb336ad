"""One recurrence a file, each a frozen dataclass of pure functions."""

from seqjax.cells.base import Cell as Cell
from seqjax.cells.base import Layer as Layer
from seqjax.cells.gated import GatedCell as GatedCell
from seqjax.cells.gated import GatedParams as GatedParams
from seqjax.cells.gru import GRUCell as GRUCell
from seqjax.cells.gru import GRUParams as GRUParams
from seqjax.cells.lstm import LSTMCarry as LSTMCarry
from seqjax.cells.lstm import LSTMCell as LSTMCell
from seqjax.cells.lstm import LSTMParams as LSTMParams
from seqjax.cells.rnn import RNNCell as RNNCell
from seqjax.cells.rnn import RNNParams as RNNParams
