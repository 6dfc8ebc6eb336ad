"""The one rule for padding: a step whose mask is off changes no state and emits zeros."""

from typing import Any

import jax
import jax.numpy as jnp

from seqjax.ops.sharding import shard_like


def where_valid(mask: jax.Array, values: Any, otherwise: Any, axis: int = 0) -> Any:
    """`values` where `mask` is on, `otherwise` where it is off, leaf by leaf.

    Args:
      mask: bool; its dimensions are those of every leaf from `axis` on.
      values: a pytree of arrays.
      otherwise: a pytree of the same structure, shapes and dtypes.
      axis: where the mask's first dimension is among the leaf's.
    """

    def choose(value: jax.Array, other: jax.Array) -> jax.Array:
        others = (*range(axis), *range(axis + mask.ndim, value.ndim))
        keep = shard_like(jnp.expand_dims(mask, others), value)
        return jnp.where(keep, value, other)

    return jax.tree.map(choose, values, otherwise)


def zero_padding(mask: jax.Array | None, values: jax.Array) -> jax.Array:
    """`values` with exact zeros where `mask` is off: no NaN passes, and no gradient."""
    if mask is None:
        return values
    return where_valid(mask, values, jnp.zeros_like(values))
