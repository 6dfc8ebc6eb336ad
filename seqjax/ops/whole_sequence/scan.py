"""`implementation="xla"`: a whole sequence at once, in the operations that XLA makes fast.

Forward, the inputs' products are formed for all steps at once, or for a chunk of them where they
are many or padding is left out, and the loop over steps is left with one product and the cell's
elementwise part.

The derivative is written down as what it is, a recurrence that is linear in the tangents, over the
gates that the forward pass saved. JAX runs it as it stands for forward mode and transposes it for
reverse mode. There the loop has one product a step again, and the gradients of the weights are one
product a chunk, where differentiating the plain scan would add up a full gradient at every step.
The derivative is itself made of differentiable parts, so every order and mode works.
"""

import functools
import math
from typing import Any

import jax

from seqjax.ops.gates import Gated, State
from seqjax.ops.masking import zero_padding
from seqjax.ops.precision import cast_like
from seqjax.ops.sharding import vary_like
from seqjax.ops.whole_sequence.chunks import Plan, own_steps, steps_of_derivative
from seqjax.ops.whole_sequence.forward import forward, forward_and_save
from seqjax.ops.whole_sequence.tangents import tangents_of_run


def scan(
    cell: Gated,
    params: Any,
    carry: Any,
    xs: jax.Array,
    *,
    mask: jax.Array | None,
    reverse: bool,
    unroll: int,
) -> tuple[Any, jax.Array]:
    """Runs the cell over the leading axis of `xs`: what `reference.scan` gives, up to rounding.

    Args:
      cell: its gates and how they are combined.
      params: `w_ih`, `w_hh`, `b_ih`, `b_hh` (None without bias), and what `cell.projection` finds.
      carry: leaves `(*batch, features)`.
      xs: `(T, *batch, features)`, at least one step.
      mask: bool `(T, *batch)`, or None.
      reverse: from the last step to the first.
      unroll: steps per iteration of the loop.
    """
    length, *batch, _ = xs.shape
    rows = math.prod(batch)
    flat = functools.partial(_with_batch, batch, (rows,))
    state = jax.tree.map(functools.partial(flat, 0), cell.split_carry(carry))
    xs = flat(1, xs)
    mask = None if mask is None else flat(1, mask)

    plan = Plan(cell, steps_of_derivative(length, rows), reverse, unroll)
    state, xs, mask = vary_like((state, xs, mask), (state, xs, mask, params))
    state, ys = _run(plan, params, state, xs, mask)
    back = functools.partial(_with_batch, (rows,), batch)
    return cell.join_carry(jax.tree.map(functools.partial(back, 0), state)), back(1, ys)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _run(
    plan: Plan, params: Any, state: State, xs: jax.Array, mask: jax.Array | None
) -> tuple[State, jax.Array]:
    state, residuals = forward(plan, params, state, xs, mask, save=False)
    return state, residuals.hs


@functools.partial(_run.defjvp, symbolic_zeros=True)
def _run_jvp(plan: Plan, primals: Any, tangents: Any) -> Any:
    params, _, xs, mask = primals
    new_state, residuals = forward_and_save(plan, *primals)
    d_values = tangents_of_run(plan, params, xs, mask, residuals, *tangents[:3])
    values = new_state, zero_padding(mask, own_steps(residuals.hs, len(xs), plan.reverse))
    return values, cast_like(d_values, values)


def _with_batch(old: Any, new: Any, axis: int, leaf: jax.Array) -> jax.Array:
    """`leaf` with the batch dimensions `new` in place of `old`, which start at `axis`."""
    if len(old) == len(new):
        return leaf
    return leaf.reshape(*leaf.shape[:axis], *new, *leaf.shape[axis + len(old) :])
