"""The Elman recurrence of `torch.nn.RNN`."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from seqjax.cells.base import (
    Cell,
    check_positive,
    check_type,
    draw_weights,
    exportable,
)
from seqjax.ops.kernel import Kernel
from seqjax.ops.precision import project
from seqjax.ops.rnn.xla import RNNKernel

NONLINEARITIES = {"tanh": jnp.tanh, "relu": jax.nn.relu}


@exportable
class RNNParams(NamedTuple):
    """Weights of an `RNNCell`, ready to multiply; the biases are None without bias."""

    w_ih: jax.Array  # (input_size, hidden_size)
    w_hh: jax.Array  # (hidden_size, hidden_size)
    b_ih: jax.Array | None  # (hidden_size,)
    b_hh: jax.Array | None  # (hidden_size,)


@dataclasses.dataclass(frozen=True)
class RNNCell(Cell[RNNParams, jax.Array]):
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

    input_size: int
    hidden_size: int
    bias: bool = True
    nonlinearity: str = "tanh"

    def __post_init__(self) -> None:
        check_nonlinearity(self.nonlinearity)
        check_type("bias", self.bias, bool)
        check_positive("input_size", self.input_size)
        check_positive("hidden_size", self.hidden_size)

    @property
    def kernel(self) -> Kernel:
        return RNNKernel(self.nonlinearity)

    @property
    def output_size(self) -> int:
        return self.hidden_size

    def init(self, key: jax.Array, dtype: DTypeLike = jnp.float32) -> RNNParams:
        """Draws the parameters from PyTorch's distribution."""
        bias_shape = (self.hidden_size,) if self.bias else None
        return RNNParams(
            **draw_weights(
                key,
                self.hidden_size,
                dtype,
                w_ih=(self.input_size, self.hidden_size),
                w_hh=(self.hidden_size, self.hidden_size),
                b_ih=bias_shape,
                b_hh=bias_shape,
            )
        )

    def initial_carry(
        self, batch_shape: tuple[int, ...] = (), dtype: DTypeLike = jnp.float32
    ) -> jax.Array:
        """Zeros, `(*batch_shape, hidden_size)`."""
        return jnp.zeros((*batch_shape, self.hidden_size), dtype)

    def step(
        self, params: RNNParams, carry: jax.Array, x: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """One time step."""
        pre = project(x, params.w_ih, params.b_ih) + project(carry, params.w_hh, params.b_hh)
        h = NONLINEARITIES[self.nonlinearity](pre).astype(x.dtype)
        return h, h


def check_nonlinearity(nonlinearity: str) -> None:
    """Raises PyTorch's ValueError unless the nonlinearity is a known one."""
    if nonlinearity not in NONLINEARITIES:
        raise ValueError(f"Unknown nonlinearity {nonlinearity!r}. Select from 'tanh' or 'relu'.")
