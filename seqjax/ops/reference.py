"""The meaning of every recurrence: the cell's own step, one time step after the other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

from seqjax.ops.masking import where_valid, zero_padding
from seqjax.ops.precision import cast_like, widen
from seqjax.ops.sharding import vary_like


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
    steps = xs.shape[0]
    if unroll > 1 and is_symbolic_dim(steps) and steps % unroll != 0:
        raise ValueError(
            f"unroll={unroll} needs a number of steps, or a symbolic one that it divides, such as "
            f"'{unroll}*t', got: {steps}. Use unroll=1"
        )
    # The gradient of the parameters is a sum over time, which the scan forms in the dtype in which
    # they enter it: 16-bit ones enter it widened. The step still sees their own dtype and values.
    # Inside of jax.shard_map the sum over devices belongs after the loop, not into each step.
    wide_params = vary_like(widen(params), (carry, xs, mask))

    def body(carry: Any, inputs: tuple[jax.Array, jax.Array | None]) -> tuple[Any, jax.Array]:
        x, valid = inputs
        # What padding holds must not reach a gradient, NaN least of all.
        x = zero_padding(valid, x)
        new_carry, y = step(cast_like(wide_params, params), carry, x)
        if valid is not None:
            new_carry = where_valid(valid, new_carry, carry)
            y = zero_padding(valid, y)
        return new_carry, y

    carry = vary_like(carry, (carry, xs, mask, params))
    return lax.scan(body, carry, (xs, mask), reverse=reverse, unroll=unroll)


def no_steps(
    step: Callable[[Any, Any, jax.Array], tuple[Any, jax.Array]],
    params: Any,
    carry: Any,
    xs: jax.Array,
    *,
    mask: jax.Array | None,
) -> tuple[Any, jax.Array]:
    """What `scan` gives of a sequence of length 0: the carry as it came, and no outputs."""
    del mask
    x = jax.eval_shape(lambda: jnp.zeros(xs.shape[1:], xs.dtype))
    _, y = jax.eval_shape(step, params, carry, x)
    return carry, jnp.zeros((0, *y.shape), y.dtype)
