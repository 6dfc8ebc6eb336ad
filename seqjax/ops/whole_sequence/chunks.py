"""The chunks of steps that a sequence is run in, and which of them hold nothing but padding."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from seqjax.ops.gates import Gated

ROWS_PER_CHUNK = 256
"""Rows (steps times batch) of a chunk of the derivative, about.

The gradient of a weight is one product a chunk. The more rows it sums, the larger its rounding
error: at 256 rows it is PyTorch's, at 1024 two to four times that.
"""

STEPS_PER_CHUNK = (2, 128)
"""At least and at most about so many steps, whatever the rows: a row may stand for many (vmap)."""

PROJECTED_AT_ONCE = 2**21
"""Elements of the inputs' product that the forward pass forms at a time, at most.

The more the faster, until a program's temporaries pass 32 MB: the operating system then gives them
anew, page by page, at every call.
"""


class Plan(NamedTuple):
    """What is known when tracing."""

    cell: Gated
    steps: int  # Steps a chunk of the derivative; the last one run may lack some.
    reverse: bool
    unroll: int


def steps_of_derivative(length: int, rows: Any) -> int:
    """Steps a chunk of the derivative.

    Args:
      length: steps in all, at least 1.
      rows: rows of the batch; may be symbolic.
    """
    fewest, most = STEPS_PER_CHUNK
    wanted = ROWS_PER_CHUNK // max(rows, 1) if isinstance(rows, int) else fewest
    wanted = min(max(wanted, fewest), most, length)
    return _even_steps(length, wanted, 2 * wanted)


def steps_of_forward(plan: Plan, length: int, rows: Any, width: int, *, skips: bool) -> int:
    """Steps a chunk of the forward pass.

    Args:
      plan: it has no fewer steps.
      length: steps in all, at least 1.
      rows: rows of the batch; may be symbolic.
      width: features of the inputs' product.
      skips: whether chunks of padding are left out.
    """
    if not isinstance(rows, int):
        return plan.steps
    most = PROJECTED_AT_ONCE // (max(rows, 16) * width)
    if skips:
        most = min(most, STEPS_PER_CHUNK[1])
    wanted = min(max(most, plan.steps), length)
    return _even_steps(length, wanted, wanted)


def _even_steps(length: int, wanted: int, most: int) -> int:
    """About `wanted`: a divisor of `length` if one is near, else the last chunk lacks some."""
    near = [d for d in range((wanted + 1) // 2, most + 1) if length % d == 0]
    evenly = -(-length // -(-length // wanted))  # The last chunk lacks as few as can be.
    return min(near, key=lambda d: max(d / wanted, wanted / d), default=evenly)


def split(leaf: jax.Array, steps: int) -> jax.Array:
    """`(T, ...)` to `(chunks, steps, ...)`."""
    return leaf.reshape(leaf.shape[0] // steps, steps, *leaf.shape[1:])


def merge(leaf: jax.Array) -> jax.Array:
    """`(chunks, steps, ...)` to `(T, ...)`."""
    return leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])


def lacking(length: int, steps: int) -> int:
    """Steps that the last of the chunks run lacks."""
    return -length % steps


def fill_chunks(leaf: jax.Array, steps: int, reverse: bool) -> jax.Array:
    """`(T, ...)` with zeros for the steps that the last of the chunks run lacks, after its own."""
    count = lacking(len(leaf), steps)
    where = (count, 0) if reverse else (0, count)
    return jnp.pad(leaf, [where, *[(0, 0)] * (leaf.ndim - 1)]) if count else leaf


def own_steps(leaf: jax.Array, length: int, reverse: bool) -> jax.Array:
    """The inverse of `fill_chunks`: the first `length` steps that are run."""
    return leaf[len(leaf) - length :] if reverse else leaf[:length]


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
