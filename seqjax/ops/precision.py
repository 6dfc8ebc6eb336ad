"""How precisely sums are kept, whatever the dtype of what is summed."""

import jax.numpy as jnp
from jax.typing import DTypeLike


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype in which products of `dtype` are summed and gates computed: float32 at least."""
    dtype = jnp.dtype(dtype)
    is_16_bit_float = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return jnp.dtype(jnp.float32) if is_16_bit_float else dtype
