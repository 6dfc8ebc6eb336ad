"""The chunks of steps that a sequence is run in, and which of them hold nothing but padding."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from seqjax.ops.kernel import Kernel

ROWS_PER_CHUNK = 1024
"""Rows of inputs (steps times batch) that are multiplied at a time, about."""

ROWS_PER_GRADIENT = 256
"""Rows of a chunk of the derivative, about.

The gradient of a weight is one product a chunk. The more rows it sums, the larger its rounding
error: at 256 rows it is PyTorch's, at 1024 two to four times that.
"""

LARGE_WEIGHTS = 2**20
"""Weights of more elements take `ROWS_PER_CHUNK` in the derivative, too.

No cache holds their gradient, which is read and written once a chunk.
"""

STEPS_PER_CHUNK = (2, 32)
"""At least and at most about so many steps, whatever the rows.

One row's products could be longer, but under `jax.vmap` a row stands for many, and a chunk of
padding is what is skipped.
"""


class Plan(NamedTuple):
    """What is known when tracing."""

    kernel: Kernel
    steps: int  # Steps a chunk of the derivative: a divisor of the number of steps.
    forward_steps: int  # Of the forward pass: a divisor, too, and a multiple of `steps`.
    reverse: bool
    unroll: int


def steps_per_chunk(length: int, rows: Any, weights: int) -> tuple[int, int]:
    """Steps a chunk of the derivative, where possible a divisor of `length`, and of forward passes.

    Args:
      length: steps in all.
      rows: rows of the batch; may be symbolic.
      weights: elements of the weights.
    """
    rows_per_gradient = ROWS_PER_GRADIENT if weights <= LARGE_WEIGHTS else ROWS_PER_CHUNK
    wanted = _steps(rows_per_gradient, rows)
    steps = max(1, _nearest_divisor(length, wanted, default=wanted))
    times = _nearest_divisor(length // steps, _steps(ROWS_PER_CHUNK, rows) // steps, default=1)
    return steps, steps * max(1, times)


def _steps(rows_per_chunk: int, rows: Any) -> int:
    fewest, most = STEPS_PER_CHUNK
    wanted = rows_per_chunk // max(rows, 1) if isinstance(rows, int) else fewest
    return min(max(wanted, fewest), most)


def _nearest_divisor(length: int, wanted: int, default: int) -> int:
    """A divisor of `length` between half and twice `wanted`, or the default."""
    if wanted >= length:
        return length
    divisors = [d for d in range((wanted + 1) // 2, 2 * wanted + 1) if d and length % d == 0]
    return min(divisors, key=lambda d: max(d / wanted, wanted / d), default=default)


def split(leaf: jax.Array, steps: int) -> jax.Array:
    """`(T, ...)` to `(chunks, steps, ...)`."""
    return leaf.reshape(leaf.shape[0] // steps, steps, *leaf.shape[1:])


def merge(leaf: jax.Array) -> jax.Array:
    """`(chunks, steps, ...)` to `(T, ...)`."""
    return leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])


def chunks_to_run(mask: jax.Array, reverse: bool) -> tuple[jax.Array, jax.Array]:
    """The indices of the chunks in the order of running, and how many of them to run.

    A chunk of padding alone changes no state, so it is left out. `mask` is `(chunks, steps, rows)`.
    """
    active = active_chunks(mask)
    numbers = jnp.arange(len(mask))
    order = jnp.argsort(jnp.where(active, -numbers if reverse else numbers, len(mask)))
    return order, active.sum()


def active_chunks(mask: jax.Array) -> jax.Array:
    """Which chunks hold anything but padding: mask (chunks, steps, rows) to (chunks,)."""
    chunks, steps, rows = mask.shape
    return _any_row(mask.reshape(chunks, steps * rows))


@custom_vmap
def _any_row(mask: jax.Array) -> jax.Array:
    """Whether anything in a chunk is valid: (chunks, steps * rows) to (chunks,).

    Under `jax.vmap` this is one answer for all sequences together, since they run together: a loop
    whose length differed between them would compute every step and then choose.
    """
    return jnp.any(mask, axis=1)


@_any_row.def_vmap
def _any_row_of_any_sequence(axis_size: int, in_batched: Any, mask: jax.Array) -> Any:
    return _any_row(jnp.any(mask, axis=0) if in_batched[0] else mask), False
