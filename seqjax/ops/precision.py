"""How precisely sums are kept, whatever the dtype of what is summed."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype in which products of `dtype` are summed and gates computed: float32 at least."""
    dtype = jnp.dtype(dtype)
    is_16_bit_float = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return jnp.dtype(jnp.float32) if is_16_bit_float else dtype


def cast(array: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`array.astype(dtype)`, which outside `jax.jit` takes its time even if it changes nothing."""
    is_so = array.dtype == dtype and not getattr(array, "weak_type", False)
    return array if is_so else array.astype(dtype)


def widen(tree: Any) -> Any:
    """Every leaf in its `accumulation_dtype`."""
    return jax.tree.map(lambda leaf: cast(leaf, accumulation_dtype(leaf.dtype)), tree)


def cast_like(tree: Any, like: Any) -> Any:
    """Every leaf in the dtype of its counterpart in `like`."""
    return jax.tree.map(lambda leaf, other: leaf.astype(other.dtype), tree, like)


# One call outside of `jax.jit`, where each operation is one that takes its time.
@functools.partial(jax.jit, inline=True)
def project(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """`x @ weight + bias`, summed and returned in `accumulation_dtype(x.dtype)`."""
    dtype = accumulation_dtype(x.dtype)
    y = jnp.matmul(x, weight, preferred_element_type=dtype)
    return add_bias(y, bias)


def add_bias(products: jax.Array, bias: jax.Array | None) -> jax.Array:
    """`products + bias` in the dtype of `products`, for JAX that refuses to promote ranks, too."""
    if bias is None:
        return products
    return products + jnp.expand_dims(cast(bias, products.dtype), range(products.ndim - 1))
