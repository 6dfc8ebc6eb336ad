"""The Elman recurrence of `torch.nn.RNN`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqjax.cells.base import exportable
from seqjax.cells.gated import GatedCell
from seqjax.ops.gates import Activation

NONLINEARITIES: Mapping[str, Activation] = {"tanh": jnp.tanh, "relu": jax.nn.relu}


@exportable
class RNNParams(NamedTuple):
    """Weights of an `RNNCell`, ready to multiply; the biases are None without bias."""

    w_ih: jax.Array  # (input_size, hidden_size)
    w_hh: jax.Array  # (hidden_size, hidden_size)
    b_ih: jax.Array | None  # (hidden_size,)
    b_hh: jax.Array | None  # (hidden_size,)


@dataclasses.dataclass(frozen=True)
class RNNCell(GatedCell[RNNParams, jax.Array]):
    """Elman recurrence, `h' = tanh(x W_ih + b_ih + h W_hh + b_hh)`, or relu for tanh.

    The carry is `h`, `(*batch, hidden_size)`, in the input's dtype, and the output is the new `h`.

    Args:
      input_size: features of `x`.
      hidden_size: features of `h`.
      bias: whether there are biases.
      nonlinearity: "tanh" or "relu".

    Raises:
      TypeError: a size is not an int, or bias not a bool.
      ValueError: a size is below 1, or the nonlinearity unknown.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.RNNCell.html

    >>> import jax, seqjax
    >>> cell = seqjax.RNNCell(input_size=3, hidden_size=5, nonlinearity="relu")
    >>> params = cell.init(jax.random.key(0))
    >>> h, y = cell.step(params, cell.initial_carry((2,)), jax.numpy.ones((2, 3)))
    >>> h.shape, y.shape
    ((2, 5), (2, 5))
    """

    params_type = RNNParams

    nonlinearity: str = "tanh"

    def __post_init__(self) -> None:
        check_nonlinearity(self.nonlinearity)
        super().__post_init__()

    @property
    def gates(self) -> Mapping[str, Activation | None]:
        return {"h": NONLINEARITIES[self.nonlinearity]}

    def combine(self, gates: Any, h: jax.Array) -> jax.Array:
        return gates.h


def check_nonlinearity(nonlinearity: str) -> None:
    """Raises PyTorch's ValueError unless the nonlinearity is a known one."""
    if nonlinearity not in NONLINEARITIES:
        raise ValueError(f"Unknown nonlinearity {nonlinearity!r}. Select from 'tanh' or 'relu'.")
