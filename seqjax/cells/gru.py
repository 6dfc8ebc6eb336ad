"""The gated recurrent unit of `torch.nn.GRU`."""

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
from seqjax.ops.gru.xla import GRUKernel
from seqjax.ops.kernel import Kernel
from seqjax.ops.precision import project


@exportable
class GRUParams(NamedTuple):
    """Weights of a `GRUCell`, ready to multiply, gates in the order r z n."""

    w_ih: jax.Array  # (input_size, 3 * hidden_size)
    w_hh: jax.Array  # (hidden_size, 3 * hidden_size)
    b_ih: jax.Array | None  # (3 * hidden_size,)
    b_hh: jax.Array | None  # (3 * hidden_size,)


@dataclasses.dataclass(frozen=True)
class GRUCell(Cell[GRUParams, jax.Array]):
    """Gated recurrent unit.

    ```
    r  = sigmoid(x W_ir + b_ir + h W_hr + b_hr)
    z  = sigmoid(x W_iz + b_iz + h W_hz + b_hz)
    n  = tanh(x W_in + b_in + r * (h W_hn + b_hn))
    h' = (1 - z) * n + z * h
    ```

    The reset gate acts after the product, and `b_hn` sits inside it, so that the two n biases
    are not interchangeable. The carry is `h`, `(*batch, hidden_size)`, in the input's dtype, and
    the output is the new `h`.

    Args:
      input_size: features of `x`.
      hidden_size: features of `h`.
      bias: whether there are biases.

    Raises:
      TypeError: a size is not an int, or bias not a bool.
      ValueError: a size is below 1.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.GRUCell.html

    >>> import jax, seqjax
    >>> cell = seqjax.GRUCell(input_size=3, hidden_size=5)
    >>> params = cell.init(jax.random.key(0))
    >>> h, y = cell.step(params, cell.initial_carry((2,)), jax.numpy.ones((2, 3)))
    >>> h.shape, y.shape
    ((2, 5), (2, 5))
    """

    input_size: int
    hidden_size: int
    bias: bool = True

    def __post_init__(self) -> None:
        check_type("bias", self.bias, bool)
        check_positive("input_size", self.input_size)
        check_positive("hidden_size", self.hidden_size)

    @property
    def kernel(self) -> Kernel:
        return GRUKernel()

    @property
    def output_size(self) -> int:
        return self.hidden_size

    def init(self, key: jax.Array, dtype: DTypeLike = jnp.float32) -> GRUParams:
        """Draws the parameters from PyTorch's distribution."""
        gates = 3 * self.hidden_size
        return GRUParams(
            **draw_weights(
                key,
                self.hidden_size,
                dtype,
                w_ih=(self.input_size, gates),
                w_hh=(self.hidden_size, gates),
                b_ih=(gates,) if self.bias else None,
                b_hh=(gates,) if self.bias else None,
            )
        )

    def initial_carry(
        self, batch_shape: tuple[int, ...] = (), dtype: DTypeLike = jnp.float32
    ) -> jax.Array:
        """Zeros, `(*batch_shape, hidden_size)`."""
        return jnp.zeros((*batch_shape, self.hidden_size), dtype)

    def step(
        self, params: GRUParams, carry: jax.Array, x: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """One time step."""
        from_x = project(x, params.w_ih, params.b_ih)
        from_h = project(carry, params.w_hh, params.b_hh)
        x_r, x_z, x_n = jnp.split(from_x, 3, axis=-1)
        h_r, h_z, h_n = jnp.split(from_h, 3, axis=-1)
        r = jax.nn.sigmoid(x_r + h_r)
        z = jax.nn.sigmoid(x_z + h_z)
        n = jnp.tanh(x_n + r * h_n)
        h = ((1 - z) * n + z * carry.astype(z.dtype)).astype(x.dtype)
        return h, h
