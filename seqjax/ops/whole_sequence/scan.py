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
import jax.numpy as jnp

from seqjax.ops.kernel import Kernel, State
from seqjax.ops.masking import zero_padding
from seqjax.ops.precision import cast_like
from seqjax.ops.sharding import vary_like
from seqjax.ops.whole_sequence.chunks import LARGE_WEIGHTS, Plan, steps_of_derivative
from seqjax.ops.whole_sequence.forward import forward, forward_and_save
from seqjax.ops.whole_sequence.tangents import tangents_of_run


def scan(
    kernel: Kernel,
    params: Any,
    state: State,
    xs: jax.Array,
    *,
    mask: jax.Array | None,
    reverse: bool,
    unroll: int,
) -> tuple[State, jax.Array]:
    """Runs the cell over the leading axis of `xs`: what `reference.scan` gives, up to rounding.

    Args:
      kernel: the cell's elementwise part.
      params: `w_ih`, `w_hh`, `b_ih`, `b_hh` (None without bias), and `w_hr` for a projection.
      state: leaves `(*batch, features)`.
      xs: `(T, *batch, features)`.
      mask: bool `(T, *batch)`, or None.
      reverse: from the last step to the first.
      unroll: steps per iteration of the loop.
    """
    length, *batch, _ = xs.shape
    rows = math.prod(batch)
    flat = functools.partial(_with_batch, batch, (rows,))
    state = jax.tree.map(functools.partial(flat, 0), state)
    xs = flat(1, xs)
    mask = None if mask is None else flat(1, mask)
    state, xs, mask = vary_like((state, xs, mask), (state, xs, mask, params))

    large = params.w_ih.size + params.w_hh.size > LARGE_WEIGHTS
    steps = steps_of_derivative(length, rows, large=large, masked=mask is not None)
    whole = length - length % steps
    pieces = [(0, whole, steps), (whole, length, length - whole)]
    pieces = [piece for piece in pieces if piece[0] < piece[1]]
    ys = [] if pieces else [jnp.zeros((0, *state.h.shape), state.h.dtype)]
    for start, stop, steps in reversed(pieces) if reverse else pieces:
        plan = Plan(kernel, steps, large, reverse, unroll)
        piece_mask = None if mask is None else mask[start:stop]
        state, piece_ys = _run(plan, params, state, xs[start:stop], piece_mask)
        ys.append(piece_ys)
    outputs = ys[0] if len(ys) == 1 else jnp.concatenate(ys[::-1] if reverse else ys)
    back = functools.partial(_with_batch, (rows,), batch)
    return jax.tree.map(functools.partial(back, 0), state), back(1, outputs)


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
    values = new_state, zero_padding(mask, residuals.hs)
    return values, cast_like(d_values, values)


def _with_batch(old: Any, new: Any, axis: int, leaf: jax.Array) -> jax.Array:
    """`leaf` with the batch dimensions `new` in place of `old`, which start at `axis`."""
    if len(old) == len(new):
        return leaf
    return leaf.reshape(*leaf.shape[:axis], *new, *leaf.shape[axis + len(old) :])
