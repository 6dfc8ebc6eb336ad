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

    carry = _typed_as_result(body, carry, (xs, mask), params)
    return lax.scan(body, carry, (xs, mask), reverse=reverse, unroll=unroll)


def _typed_as_result(body: Callable[..., Any], carry: Any, inputs: Any, params: Any) -> Any:
    """The carry with the sharding type that `body` returns it with.

    A scan's carry has to enter with the type that it leaves with. Zeros, or a replicated state,
    that meet inputs sharded by `jax.shard_map` or over a mesh with explicit axes would not.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes:
        # A select between twice the same value takes on its predicate's axes; XLA removes it.
        predicates = [jnp.any(leaf == leaf) for leaf in jax.tree.leaves((carry, inputs, params))]
        predicate = functools.reduce(operator.or_, predicates)
        return jax.tree.map(lambda leaf: lax.select(predicate, leaf, leaf), carry)
    if mesh.explicit_axes:
        first_inputs = jax.tree.map(lambda leaf: leaf[0], inputs)
        result, _ = jax.eval_shape(body, carry, first_inputs)
        reshard: Callable[..., jax.Array] = jax.sharding.reshard
        return jax.tree.map(lambda leaf, like: reshard(leaf, like.sharding.spec), carry, result)
    return carry
