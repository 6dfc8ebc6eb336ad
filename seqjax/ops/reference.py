"""The meaning of every recurrence: the cell's own step, one time step after the other."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.ops.masking import where_valid, zero_padding
from seqjax.ops.precision import accumulation_dtype


def scan(
    step: Callable[[Any, Any, jax.Array], tuple[Any, jax.Array]],
    params: Any,
    carry: Any,
    xs: jax.Array,
    *,
    mask: jax.Array | None,
    reverse: bool,
    unroll: int,
) -> tuple[Any, jax.Array]:
    """Runs `step` over the leading axis of `xs` with `lax.scan`.

    Every order and mode of derivative works. A step whose mask is off leaves the carry as it was
    and emits zeros; a reversed scan therefore starts at each row's last valid step by itself.
    """
    # The gradient of the parameters is a sum over time, which the scan forms in the dtype in which
    # they enter it: 16-bit ones enter it widened. The step still sees their own dtype and values.
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, params)
    wide_params = jax.tree.map(lambda leaf: leaf.astype(accumulation_dtype(leaf.dtype)), params)

    def body(carry: Any, inputs: tuple[jax.Array, jax.Array | None]) -> tuple[Any, jax.Array]:
        x, valid = inputs
        step_params = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), wide_params, dtypes)
        new_carry, y = step(step_params, carry, x)
        if valid is not None:
            new_carry = where_valid(valid, new_carry, carry)
            y = zero_padding(valid, y)
        return new_carry, y

    carry = _vary_over_mesh_like(carry, (params, xs, mask))
    return lax.scan(body, carry, (xs, mask), reverse=reverse, unroll=unroll)


def _vary_over_mesh_like(carry: Any, operands: Any) -> Any:
    """Makes the carry vary over every mesh axis that some operand varies over.

    Inside `jax.shard_map` a scan's carry has to enter with the type that it leaves with; zeros, or
    a replicated state, that meet sharded inputs would not. A select between twice the same value
    takes its predicate's axes on, and XLA removes it.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return carry
    predicates = [jnp.any(leaf == leaf) for leaf in jax.tree.leaves((carry, operands))]
    predicate = functools.reduce(operator.or_, predicates)
    return jax.tree.map(lambda leaf: lax.select(predicate, leaf, leaf), carry)
