"""The gated recurrent unit of `torch.nn.GRU`."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqjax.cells.base import exportable
from seqjax.cells.gated import GatedCell


@exportable
class GRUParams(NamedTuple):
    """Weights of a `GRUCell`, ready to multiply, gates in the order r z n."""

    w_ih: jax.Array  # (input_size, 3 * hidden_size)
    w_hh: jax.Array  # (hidden_size, 3 * hidden_size)
    b_ih: jax.Array | None  # (3 * hidden_size,)
    b_hh: jax.Array | None  # (3 * hidden_size,)


@dataclasses.dataclass(frozen=True)
class GRUCell(GatedCell[GRUParams, jax.Array]):
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

    gates = {"r": jax.nn.sigmoid, "z": jax.nn.sigmoid, "n": None}
    params_type = GRUParams

    def combine(self, gates: Any, h: jax.Array) -> jax.Array:
        n_x, n_h = gates.n
        n = jnp.tanh(n_x + gates.r * n_h)
        return (1 - gates.z) * n + gates.z * h
