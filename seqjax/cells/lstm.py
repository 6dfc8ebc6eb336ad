"""The long short-term memory of `torch.nn.LSTM`, with its optional projection."""

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
from seqjax.ops.lstm.xla import LSTMKernel
from seqjax.ops.precision import accumulation_dtype, project


@exportable
class LSTMParams(NamedTuple):
    """Weights of an `LSTMCell`, ready to multiply, gates in the order i f g o."""

    w_ih: jax.Array  # (input_size, 4 * hidden_size)
    w_hh: jax.Array  # (output_size, 4 * hidden_size)
    b_ih: jax.Array | None  # (4 * hidden_size,)
    b_hh: jax.Array | None  # (4 * hidden_size,)
    w_hr: jax.Array | None  # (hidden_size, proj_size)


@exportable
class LSTMCarry(NamedTuple):
    """State of an `LSTMCell`: `h` in the input's dtype, `c` in float32 at least."""

    h: jax.Array  # (*batch, output_size)
    c: jax.Array  # (*batch, hidden_size)


@dataclasses.dataclass(frozen=True)
class LSTMCell(Cell[LSTMParams, LSTMCarry]):
    """Long short-term memory.

    ```
    i  = sigmoid(x W_ii + b_ii + h W_hi + b_hi)
    f  = sigmoid(x W_if + b_if + h W_hf + b_hf)
    g  =    tanh(x W_ig + b_ig + h W_hg + b_hg)
    o  = sigmoid(x W_io + b_io + h W_ho + b_ho)
    c' = f * c + i * g
    h' = o * tanh(c')            with a projection: h' = (o * tanh(c')) W_hr
    ```

    The carry is `LSTMCarry(h, c)` and the output is the new `h`. With bfloat16 or float16 inputs
    `c` stays in float32, since rounding it at every step would lose small updates.

    Args:
      input_size: features of `x`.
      hidden_size: features of `c`, and of `h` without a projection.
      bias: whether there are biases; the projection never has one.
      proj_size: features of `h` when above 0; 0 means no projection.

    Raises:
      TypeError: a size is not an int, or bias not a bool.
      ValueError: a size is below 1, or proj_size not in [0, hidden_size).

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html

    >>> import jax, seqjax
    >>> cell = seqjax.LSTMCell(input_size=3, hidden_size=5, proj_size=2)
    >>> params = cell.init(jax.random.key(0))
    >>> carry, y = cell.step(params, cell.initial_carry((4,)), jax.numpy.ones((4, 3)))
    >>> carry.h.shape, carry.c.shape, y.shape
    ((4, 2), (4, 5), (4, 2))
    """

    input_size: int
    hidden_size: int
    bias: bool = True
    proj_size: int = 0

    def __post_init__(self) -> None:
        check_type("bias", self.bias, bool)
        check_positive("input_size", self.input_size)
        check_positive("hidden_size", self.hidden_size)
        check_type("proj_size", self.proj_size, int)
        if self.proj_size < 0:
            raise ValueError(
                "proj_size should be a positive integer or zero to disable projections, "
                f"got: {self.proj_size}"
            )
        if self.proj_size >= self.hidden_size:
            raise ValueError(
                "proj_size has to be smaller than hidden_size, "
                f"got: proj_size={self.proj_size} and hidden_size={self.hidden_size}"
            )

    @property
    def kernel(self) -> Kernel:
        return LSTMKernel()

    @property
    def output_size(self) -> int:
        return self.proj_size or self.hidden_size

    def init(self, key: jax.Array, dtype: DTypeLike = jnp.float32) -> LSTMParams:
        """Draws the parameters from PyTorch's distribution."""
        gates = 4 * self.hidden_size
        return LSTMParams(
            **draw_weights(
                key,
                self.hidden_size,
                dtype,
                w_ih=(self.input_size, gates),
                w_hh=(self.output_size, gates),
                b_ih=(gates,) if self.bias else None,
                b_hh=(gates,) if self.bias else None,
                w_hr=(self.hidden_size, self.proj_size) if self.proj_size else None,
            )
        )

    def initial_carry(
        self, batch_shape: tuple[int, ...] = (), dtype: DTypeLike = jnp.float32
    ) -> LSTMCarry:
        """Zeros: `h` in `dtype`, `c` in float32 at least."""
        return LSTMCarry(
            h=jnp.zeros((*batch_shape, self.output_size), dtype),
            c=jnp.zeros((*batch_shape, self.hidden_size), accumulation_dtype(dtype)),
        )

    def step(
        self, params: LSTMParams, carry: LSTMCarry, x: jax.Array
    ) -> tuple[LSTMCarry, jax.Array]:
        """One time step."""
        gates = project(x, params.w_ih, params.b_ih) + project(carry.h, params.w_hh, params.b_hh)
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        c = jax.nn.sigmoid(f) * carry.c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = (jax.nn.sigmoid(o) * jnp.tanh(c)).astype(x.dtype)
        if params.w_hr is not None:
            h = project(h, params.w_hr).astype(x.dtype)
        return LSTMCarry(h, c), h
