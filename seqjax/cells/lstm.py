"""The long short-term memory of `torch.nn.LSTM`, with its optional projection."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqjax.cells.base import check_type, exportable
from seqjax.cells.gated import GatedCell


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
class LSTMCell(GatedCell[LSTMParams, LSTMCarry]):
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

    gates = {"i": jax.nn.sigmoid, "f": jax.nn.sigmoid, "g": jnp.tanh, "o": jax.nn.sigmoid}
    carry_type = LSTMCarry
    params_type = LSTMParams

    proj_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
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

    def combine(self, gates: Any, carry: LSTMCarry) -> LSTMCarry:
        c = gates.f * carry.c + gates.i * gates.g
        return LSTMCarry(gates.o * jnp.tanh(c), c)

    @property
    def output_size(self) -> int:
        return self.proj_size or self.hidden_size

    def param_shapes(self) -> dict[str, tuple[int, ...] | None]:
        w_hr = (self.hidden_size, self.proj_size) if self.proj_size else None
        return super().param_shapes() | {"w_hr": w_hr}

    def projection(self, params: LSTMParams) -> jax.Array | None:
        return params.w_hr
