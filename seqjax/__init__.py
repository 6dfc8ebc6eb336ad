"""PyTorch's recurrent layers as pure JAX functions.

The Flax modules are `seqjax.nnx` and `seqjax.linen`, which are imported on their own.
"""

from seqjax import initializers, interop
from seqjax.cells import (
    Cell,
    GatedCell,
    GatedParams,
    GRUCell,
    GRUParams,
    Layer,
    LSTMCarry,
    LSTMCell,
    LSTMParams,
    RNNCell,
    RNNParams,
)
from seqjax.decoding import Beams, Generation, beam_search, generate
from seqjax.layers import Bidirectional, BidirectionalCarry, BidirectionalParams, Stack
from seqjax.recurrence import scan
from seqjax.sequences import lengths_to_mask, mask_to_lengths, pad_sequence, unpad_sequence

__version__ = "0.1.0"  # The one place: pyproject.toml reads it here.

__all__ = [
    "Beams",
    "Bidirectional",
    "BidirectionalCarry",
    "BidirectionalParams",
    "Cell",
    "GRUCell",
    "GRUParams",
    "GatedCell",
    "GatedParams",
    "Generation",
    "LSTMCarry",
    "LSTMCell",
    "LSTMParams",
    "Layer",
    "RNNCell",
    "RNNParams",
    "Stack",
    "beam_search",
    "generate",
    "initializers",
    "interop",
    "lengths_to_mask",
    "mask_to_lengths",
    "pad_sequence",
    "scan",
    "unpad_sequence",
]
__dir__ = __all__.copy  # What dir() and tab completion show.
