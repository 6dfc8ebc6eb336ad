"""Memory for time in training: keep the state at every √T-th step, recompute what is between."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from seqjax.ops.precision import cast_like, widen
from seqjax.ops.sharding import vary_like


def in_chunks(
    run: Callable[..., tuple[Any, jax.Array]],
    params: Any,
    carry: Any,
    xs: jax.Array,
    *,
    mask: jax.Array | None,
    reverse: bool,
) -> tuple[Any, jax.Array]:
    """`run(params, carry, xs, mask=mask)`, a chunk of about √T steps after the other.

    The backward pass keeps each chunk's first carry, and computes the chunk once more for the rest.
    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174.
    """
    length = xs.shape[0]
    steps = max(1, math.isqrt(length))
    chunks = length // steps
    whole = chunks * steps
    # Their gradient is a sum over chunks, which 16 bits would round each time.
    wide_params = vary_like(widen(params), (params, carry, xs, mask))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def run_chunk(carry: Any, inputs: Any) -> tuple[Any, jax.Array]:
        x, valid = inputs
        return run(cast_like(wide_params, params), carry, x, mask=valid)

    def split(leaf: jax.Array) -> jax.Array:
        return leaf[:whole].reshape(chunks, steps, *leaf.shape[1:])

    def run_whole(carry: Any) -> tuple[Any, jax.Array]:
        carry = vary_like(carry, (carry, xs, mask, params))
        carry, ys = lax.scan(run_chunk, carry, jax.tree.map(split, (xs, mask)), reverse=reverse)
        return carry, ys.reshape(whole, *ys.shape[2:])

    if whole == length:
        return run_whole(carry)
    rest = jax.tree.map(lambda leaf: leaf[whole:], (xs, mask))
    if reverse:
        carry, last = run_chunk(carry, rest)
        carry, first = run_whole(carry)
    else:
        carry, first = run_whole(carry)
        carry, last = run_chunk(carry, rest)
    return carry, jnp.concatenate([first, last])
