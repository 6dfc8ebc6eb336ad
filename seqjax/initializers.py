"""Initial distributions of the weights, as JAX initializers `(key, shape, dtype) -> array`."""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

__all__ = ["forget_bias", "orthogonal", "torch_uniform"]
__dir__ = __all__.copy  # What dir() and tab completion show.

Initializer = Callable[[jax.Array, tuple[int, ...], DTypeLike], jax.Array]


def torch_uniform(hidden_size: int) -> Initializer:
    """PyTorch's initial distribution of every recurrent weight and bias.

    `U(-k, k)` with `k = 1 / sqrt(hidden_size)`, for weights and biases alike; an LSTM with a
    projection still uses `hidden_size`, not `proj_size`.

    Args:
      hidden_size: width of the hidden state, at least 1.

    Returns:
      An initializer `(key, shape, dtype) -> array`.

    Raises:
      ValueError: hidden_size is below 1.

    Source: `torch.nn.RNNBase.reset_parameters`, PyTorch 2.13.

    >>> import jax
    >>> init = torch_uniform(4)
    >>> bool(abs(init(jax.random.key(0), (100,), float)).max() <= 0.5)
    True
    """
    if hidden_size < 1:
        raise ValueError(f"hidden_size must be greater than zero, got: {hidden_size}")
    bound = 1.0 / math.sqrt(hidden_size)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)

    return init


def orthogonal(scale: float = 1.0) -> Initializer:
    """Orthogonal weights in every gate: products with them keep the length of h.

    A weight `(h, n * h)`, of n gates side by side, gets n orthogonal squares; one of another shape
    is drawn as by `jax.nn.initializers.orthogonal`. 16-bit types are drawn in float32 and rounded.

    Args:
      scale: what they are multiplied by.

    Returns:
      An initializer `(key, shape, dtype) -> array`. It raises ValueError for what is no matrix.

    Source: Saxe et al. 2014, https://arxiv.org/abs/1312.6120

    >>> import jax, jax.numpy as jnp
    >>> w_hh = orthogonal()(jax.random.key(0), (5, 20), float)
    >>> gate = w_hh[:, 5:10]
    >>> bool(jnp.allclose(gate @ gate.T, jnp.eye(5), atol=1e-5))
    True
    """
    draw = jax.nn.initializers.orthogonal(scale)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        if len(shape) != 2:
            raise ValueError(f"orthogonal draws matrices (rows, columns), got shape: {shape}")
        rows, columns = shape
        gates, rest = divmod(columns, rows)
        wide = dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.float32
        if rest or gates < 2:
            return draw(key, shape, wide).astype(dtype)
        keys = jax.random.split(key, gates)
        squares = [draw(gate_key, (rows, rows), wide) for gate_key in keys]
        return jnp.concatenate(squares, axis=-1).astype(dtype)

    return init


def forget_bias(value: float = 1.0) -> Initializer:
    """Biases of an LSTM that forgets little at first: `value` at the forget gate, 0 elsewhere.

    A gate's two biases, in `b_ih` and `b_hh`, are added, and both are drawn by one initializer:
    each gets half of the value.

    Args:
      value: the forget gate's bias.

    Returns:
      An initializer `(key, shape, dtype) -> array` of shapes `(4 * hidden_size,)`, gates in the
      order i f g o.

    Raises:
      ValueError: by the initializer, for another shape; by a module, for a layer of other gates.

    Source: Gers et al. 2000; Jozefowicz et al. 2015,
    https://proceedings.mlr.press/v37/jozefowicz15.html

    >>> import jax
    >>> forget_bias()(jax.random.key(0), (8,), float).tolist()
    [0.0, 0.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0]
    """
    return _ForgetBias(value)


@dataclasses.dataclass(frozen=True)
class _ForgetBias:
    value: float

    gates: ClassVar[int] = 4
    """Those of the only layers that it is for: modules compare the number with their own."""

    def __call__(
        self, key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
    ) -> jax.Array:
        del key
        if len(shape) != 1 or shape[0] % self.gates:
            raise ValueError(
                "forget_bias draws an LSTM's biases, of shape (4 * hidden_size,), got shape: "
                f"{shape}"
            )
        hidden_size = shape[0] // self.gates
        zeros = jnp.zeros(shape, dtype)
        return zeros.at[hidden_size : 2 * hidden_size].set(self.value / 2)
