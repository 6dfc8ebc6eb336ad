"""The weights and inputs of a case, the same for every peer, and how far results are apart."""

from typing import NamedTuple

import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
import numpy as np

from benchmarks.cases import Case

VOCABULARY = 100


class CellWeights(NamedTuple):
    """Weights of one cell, ready to multiply, gates in PyTorch's order.

    There is one bias, the one added to x: PyTorch's second one, `b_hh`, is zero and its gradient is
    not compared, since the GRU of flax's nnx has none inside the reset gate. Peers that have it
    still compute with it and differentiate it.
    """

    w_ih: np.ndarray  # (input, gates * hidden)
    w_hh: np.ndarray  # (hidden, gates * hidden)
    bias: np.ndarray  # (gates * hidden,)


class Data(NamedTuple):
    """Everything in float64, with values that the case's dtype can hold."""

    weights: list[list[CellWeights]]  # by layer and direction
    xs: np.ndarray  # (time, batch, input)
    cotangent: np.ndarray  # (time, batch, directions * hidden), zero at padding
    lengths: np.ndarray | None  # (batch,), int32
    mask: np.ndarray  # (time, batch, 1), 0 at padding
    embedding: np.ndarray  # (vocabulary, input)
    head: np.ndarray  # (hidden, vocabulary)


def make_data(case: Case, dtype: str) -> Data:
    """Draws a case's data, the same in every process."""
    rng = np.random.default_rng(0)

    def rounded(array: np.ndarray) -> np.ndarray:
        return array.astype(dtype).astype(np.float64)

    def cell_weights(input_size: int) -> CellWeights:
        bound = case.hidden_size**-0.5
        columns = case.gates * case.hidden_size
        shapes = (input_size, columns), (case.hidden_size, columns), (columns,)
        return CellWeights(*(rounded(rng.uniform(-bound, bound, shape)) for shape in shapes))

    weights = [
        [cell_weights(size) for _ in range(case.num_directions)] for size in case.input_sizes
    ]
    lengths = rng.integers(1, case.time + 1, case.batch, np.int32) if case.ragged else None
    longest = case.time if lengths is None else lengths
    mask = (np.arange(case.time)[:, None] < np.broadcast_to(longest, case.batch))[..., None]
    return Data(
        weights=weights,
        xs=rounded(rng.standard_normal((case.time, case.batch, case.input_size))),
        cotangent=rounded(rng.standard_normal((case.time, case.batch, case.output_size)) * mask),
        lengths=lengths,
        mask=mask.astype(np.float64),
        embedding=rounded(rng.standard_normal((VOCABULARY, case.input_size))),
        head=rounded(rng.standard_normal((case.hidden_size, VOCABULARY))),
    )


def largest_error(values: list[np.ndarray], reference: list[np.ndarray]) -> float:
    """The largest |value - reference| / max |reference| of all arrays, each by its own maximum.

    Tokens, which are integers, give the fraction that differ.
    """
    errors = []
    for value, expected in zip(values, reference, strict=True):
        if value.shape != expected.shape:
            raise ValueError(f"a result has shape {value.shape}, the reference {expected.shape}")
        if np.issubdtype(expected.dtype, np.integer):
            errors.append(np.mean(value != expected))
        else:
            errors.append(np.max(np.abs(value - expected)) / np.max(np.abs(expected)))
    return float(np.max(errors))
