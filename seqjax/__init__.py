"""PyTorch's recurrent layers as pure JAX functions. The Flax modules are `seqjax.nnx` and
`seqjax.linen`, which are imported on their own."""

from seqjax import initializers as initializers
from seqjax import interop as interop
from seqjax.cells import Cell as Cell
from seqjax.cells import GatedCell as GatedCell
from seqjax.cells import GatedParams as GatedParams
from seqjax.cells import GRUCell as GRUCell
from seqjax.cells import GRUParams as GRUParams
from seqjax.cells import Layer as Layer
from seqjax.cells import LSTMCarry as LSTMCarry
from seqjax.cells import LSTMCell as LSTMCell
from seqjax.cells import LSTMParams as LSTMParams
from seqjax.cells import RNNCell as RNNCell
from seqjax.cells import RNNParams as RNNParams
from seqjax.decoding import Beams as Beams
from seqjax.decoding import Generation as Generation
from seqjax.decoding import beam_search as beam_search
from seqjax.decoding import generate as generate
from seqjax.layers import Bidirectional as Bidirectional
from seqjax.layers import BidirectionalCarry as BidirectionalCarry
from seqjax.layers import BidirectionalParams as BidirectionalParams
from seqjax.layers import Stack as Stack
from seqjax.recurrence import scan as scan
from seqjax.sequences import lengths_to_mask as lengths_to_mask
from seqjax.sequences import mask_to_lengths as mask_to_lengths
from seqjax.sequences import pad_sequence as pad_sequence
from seqjax.sequences import unpad_sequence as unpad_sequence
