"""The chunks of steps that a sequence is run in, and which of them hold nothing but padding."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from seqjax.ops.kernel import Kernel

PROJECTED_AT_ONCE = 2**22
"""Elements of the inputs' product that are formed at a time without a mask, at most.

The more the faster, until a program's temporaries pass 32 MB: the operating system then gives them
anew, page by page, at every call. With a derivative, which has arrays of its own, it is a quarter.
"""

ROWS_PER_SKIP = 2048
"""Rows (steps times batch) of a chunk of the forward pass with a mask, about.

What holds nothing but padding is left out chunk by chunk.
"""

STEPS_PER_SKIP = (2, 64)
"""At least and at most about so many steps of a chunk with a mask, whatever the rows."""

ROWS_PER_GRADIENT = 256
"""Rows of a chunk of the derivative, about.

The gradient of a weight is one product a chunk. The more rows it sums, the larger its rounding
error: at 256 rows it is PyTorch's, at 1024 two to four times that.
"""

STEPS_PER_GRADIENT = (2, 128)
"""At least and at most about so many of its steps without a mask, whatever the rows.

Under `jax.vmap`, one row stands for many.
"""

LARGE_WEIGHTS = 2**20
"""Weights of more elements are large: no cache holds them or their gradient."""

ROWS_PER_LARGE_GRADIENT = 1024
"""`ROWS_PER_GRADIENT` of large weights, whose gradient is read and written once a chunk."""


class Plan(NamedTuple):
    """What is known when tracing."""

    kernel: Kernel
    steps: int  # Steps a chunk of the derivative: a divisor of the number of steps.
    large: bool  # Whether the weights are: `LARGE_WEIGHTS`.
    reverse: bool
    unroll: int


def steps_of_derivative(length: int, rows: Any, *, large: bool, masked: bool) -> int:
    """Steps a chunk of the derivative, where possible a divisor of `length`.

    Args:
      length: steps in all.
      rows: rows of the batch; may be symbolic.
      large: whether the weights are.
      masked: whether chunks of padding are left out.
    """
    rows_per_chunk = ROWS_PER_LARGE_GRADIENT if large else ROWS_PER_GRADIENT
    steps = STEPS_PER_SKIP if masked else STEPS_PER_GRADIENT
    wanted = _steps(rows_per_chunk, steps, rows)
    return max(1, _nearest_divisor(length, wanted, default=wanted))


def steps_of_forward(
    plan: Plan, length: int, rows: Any, width: int, *, masked: bool, saves: bool
) -> int:
    """Steps a chunk of the forward pass: a divisor of `length`.

    Args:
      plan: `plan.steps` is a divisor of `length`, too.
      length: steps in all.
      rows: rows of the batch; may be symbolic.
      width: features of the inputs' product; 0 if it is not formed ahead of the step.
      masked: whether chunks of padding are left out.
      saves: whether the derivative's arrays are there as well.
    """
    if masked or not isinstance(rows, int):
        wanted = _steps(ROWS_PER_SKIP, STEPS_PER_SKIP, rows)
        return _nearest_divisor(length, wanted, default=plan.steps)
    # One row may stand for many under `jax.vmap`.
    elements_per_step = max(rows, 16) * width
    most = PROJECTED_AT_ONCE // (4 if saves else 1)
    divisors = [d for d in range(plan.steps, length + 1) if length % d == 0]
    return max((d for d in divisors if d * elements_per_step <= most), default=plan.steps)


def _steps(rows_per_chunk: int, steps: tuple[int, int], rows: Any) -> int:
    fewest, most = steps
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
