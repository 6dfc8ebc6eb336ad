"""Initial distributions of the weights, as JAX initializers `(key, shape, dtype) -> array`."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

__all__ = ["torch_uniform"]
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
