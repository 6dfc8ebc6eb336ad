"""The chunks of steps that a sequence is run in, and which of them hold nothing but padding."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from seqjax.ops.kernel import Kernel

ROWS_PER_CHUNK = 1024
"""About so many rows of inputs (steps times batch) are multiplied at a time."""

STEPS_PER_CHUNK = 128
"""At most about so many steps, however few the rows: one row's states then stay in the cache."""


class Plan(NamedTuple):
    """What is known when tracing."""

    kernel: Kernel
    steps: int  # Steps a chunk: a divisor of the number of steps.
    reverse: bool
    unroll: int


def steps_per_chunk(length: int, rows: Any, masked: bool) -> int:
    """Steps that make some `ROWS_PER_CHUNK` rows; where possible, a divisor of `length`.

    Chunks of padding alone are skipped, so a masked sequence has some 16 of them at least.
    """
    wanted = max(1, ROWS_PER_CHUNK // max(rows, 1)) if isinstance(rows, int) else 16
    wanted = min(wanted, STEPS_PER_CHUNK)
    if masked:
        wanted = min(wanted, max(16, length // 16))
    if wanted >= length:
        return length
    divisors = [d for d in range((wanted + 1) // 2, 2 * wanted + 1) if length % d == 0]
    return min(divisors, key=lambda d: max(d / wanted, wanted / d), default=wanted)


def chunks_to_run(
    plan: Plan, mask: jax.Array | None, chunks: int
) -> tuple[jax.Array | None, jax.Array | int]:
    """The indices of the chunks in the order of running, and how many of them to run.

    A chunk of padding alone changes no state, so it is left out. No order means 0, 1, 2, …
    """
    forward = jnp.arange(chunks)
    if mask is None:
        return (forward[::-1] if plan.reverse else None), chunks
    active = active_chunks(plan, mask)
    active = active[::-1] if plan.reverse else active
    (order,) = jnp.nonzero(active, size=chunks, fill_value=0)
    return (chunks - 1 - order if plan.reverse else order), active.sum()


def active_chunks(plan: Plan, mask: jax.Array) -> jax.Array:
    """Which chunks hold anything but padding: mask (T, rows) to (chunks,)."""
    steps, rows = mask.shape
    return _any_row(mask.reshape(steps // plan.steps, plan.steps * rows))


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
