"""Memory for time in training: keep the state at every √T-th step, recompute what is between."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim

from seqjax.ops.precision import cast_like, widen
from seqjax.ops.sharding import vary_like

SYMBOLIC_CHUNK = 32
"""Steps of a chunk where T is symbolic and has no root: that of T = 1024."""


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

    Of a symbolic T, a chunk is `SYMBOLIC_CHUNK` steps.

    The backward pass keeps each chunk's first carry, and computes the chunk once more for the rest.
    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174.
    """
    given, steps = xs.shape[0], SYMBOLIC_CHUNK
    if is_symbolic_dim(given):
        xs, mask = _fill_up(xs, mask)
    else:
        steps = max(1, math.isqrt(given))
    length = xs.shape[0]
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
        carry, ys = run_whole(carry)
        return carry, ys[:given]
    rest = jax.tree.map(lambda leaf: leaf[whole:], (xs, mask))
    if reverse:
        carry, last = run_chunk(carry, rest)
        carry, first = run_whole(carry)
    else:
        carry, first = run_whole(carry)
        carry, last = run_chunk(carry, rest)
    return carry, jnp.concatenate([first, last])


def _fill_up(xs: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Padding up to whole chunks: a rest might have no step, which no `lax.scan` takes."""
    if mask is None:
        mask = jnp.ones(xs.shape[:-1], bool)
    length = xs.shape[0]
    missing = ((length - 1) // SYMBOLIC_CHUNK + 1) * SYMBOLIC_CHUNK - length

    def fill_up(leaf: jax.Array) -> jax.Array:
        return jnp.concatenate([leaf, jnp.zeros((missing, *leaf.shape[1:]), leaf.dtype)])

    return fill_up(xs), fill_up(mask)
