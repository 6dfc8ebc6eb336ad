"""The derivative: a recurrence that is linear in the tangents, over the gates that were saved."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from seqjax.ops import elementwise
from seqjax.ops.elementwise import barrier
from seqjax.ops.gates import Gated, State, keeps_apart
from seqjax.ops.masking import where_valid, zero_padding
from seqjax.ops.precision import widen
from seqjax.ops.sharding import vary_like
from seqjax.ops.whole_sequence.chunks import (
    Plan,
    active_chunks,
    fill_chunks,
    lacking,
    merge,
    own_steps,
    split,
)
from seqjax.ops.whole_sequence.forward import Residuals, input_bias, total


def tangents_of_run(
    plan: Plan,
    params: Any,
    xs: jax.Array,
    mask: jax.Array | None,
    residuals: Residuals,
    d_params: Any,
    d_state: State,
    d_xs: Any,
) -> tuple[State, jax.Array]:
    """Tangents of the final state and the outputs: a scan, linear in the last three arguments.

    Everything is in the accumulation dtype, so that sums over time are, too.
    """
    cell = plan.cell
    weights_move = not all(isinstance(leaf, SymbolicZero) for leaf in jax.tree.leaves(d_params))
    d_params, d_state = widen(jax.tree.map(_instantiate, (d_params, d_state)))
    d_xs = None if isinstance(d_xs, SymbolicZero) else widen(d_xs)
    params = widen(params)
    # Inside of jax.shard_map the sum over devices belongs after the loop, not into each step.
    like = (xs, mask, residuals)
    params, d_params, d_state = vary_like((params, d_params, d_state), like)
    # Transposed for the backward loop once, and not at every step of it.
    w_hh = barrier(params.w_hh.T)
    w_hr = cell.projection(params)

    # A mask holds the state over the steps added to the last chunk. Without one, they are run, and
    # the final state is that before them.
    lacks = mask is None and lacking(len(xs), plan.steps) > 0

    # Recomputed in the backward pass, chunk by chunk and step by step: what is kept between the
    # passes are the residuals alone, and not every factor of the derivative.
    remat = functools.partial(jax.checkpoint, prevent_cse=False)

    @remat
    def run_step(d_state: State, inputs: Any) -> Any:
        factors, d, valid = inputs
        d_from_h = total(_dot(d_state.h, w_hh, 1, 1), d.of_h)
        d_new = elementwise.tangent(cell, factors, d.of_x, d_from_h, d_state)
        if w_hr is not None:
            d_new = d_new._replace(h=total(d_new.h @ w_hr, d.of_m))
        if valid is not None:
            d_new = where_valid(valid, d_new, d_state)
        return d_new, (zero_padding(valid, d_new.h), d_new if lacks else None)

    @remat
    def run_chunk(d_state: State, inputs: Any) -> Any:
        x, d_x, valid, chunk, active = inputs
        before, hs = widen((chunk.before, chunk.hs))
        # All that is not linear stays outside of the condition: differentiated, a condition copies
        # what enters it.
        factors = elementwise.factors(cell, chunk.saved, before, hs)
        m = None if w_hr is None else elementwise.hidden(cell, chunk.saved, before, hs)
        x = widen(zero_padding(valid, x))
        values = _values(cell, x, before.h, m, bias=params.b_ih is not None)

        def multiply(values: jax.Array, weights: jax.Array) -> jax.Array:
            return _dot(values, weights, 0, 0).reshape(*x.shape[:2], weights.shape[-1])

        def run(d_state: State) -> Any:
            d = _Products(None, None, None)
            if weights_move:
                d = jax.tree.map(multiply, values, _weights(cell, d_params))
            if d_x is not None:
                to = "of_x" if keeps_apart(cell) else "of_h"
                d = d._replace(**{to: total(getattr(d, to), d_x @ params.w_ih)})
            steps = (factors, d, valid)
            return lax.scan(run_step, d_state, steps, reverse=plan.reverse)

        def skip(d_state: State) -> Any:
            d_hs = jnp.zeros((plan.steps, *d_state.h.shape), d_state.h.dtype)
            return d_state, (vary_like(d_hs, like), None)

        return run(d_state) if active is None else lax.cond(active, run, skip, d_state)

    def whole_chunks(leaf: jax.Array) -> jax.Array:
        return split(fill_chunks(leaf, plan.steps, plan.reverse), plan.steps)

    inputs = jax.tree.map(whole_chunks, (xs, d_xs, mask, residuals))
    active = None if mask is None else active_chunks(inputs[2])
    d_state, (d_hs, d_states) = lax.scan(
        run_chunk, d_state, (*inputs, active), reverse=plan.reverse
    )
    if lacks:
        last = lacking(len(xs), plan.steps) if plan.reverse else len(xs) - 1
        d_state = jax.tree.map(lambda leaf: merge(leaf)[last], d_states)
    return d_state, own_steps(merge(d_hs), len(xs), plan.reverse)


class _Products(NamedTuple):
    """Of the products with weights: the weights, or what they multiply, or the products' tangents.

    Weights of one product are put below each other, biases too, which multiply ones: few gradients
    to sum, and few products. Unless the cell keeps apart what comes from x, that is with h.
    """

    of_x: jax.Array | None
    of_h: jax.Array | None
    of_m: jax.Array | None  # The projection's.


def _weights(cell: Gated, params: Any) -> _Products:
    """Put together within a chunk, so that gradients are cut from a chunk's, and not in the end."""
    bias = input_bias(cell, params)
    return _put_together(cell, params.w_ih, bias, params.w_hh, params.b_hh, cell.projection(params))


def _values(
    cell: Gated, x: jax.Array, h: jax.Array, m: jax.Array | None, *, bias: bool
) -> _Products:
    """What the weights multiply, of a chunk. A weight's gradient is `values @ gradient`.

    XLA's product is fastest with the transpose written out, and writes least if the parts are
    transposed before they are put together. The barriers make it do so.
    """

    def transposed(values: jax.Array) -> jax.Array:
        steps, rows, features = values.shape
        return barrier(values.reshape(steps * rows, features).T)

    x, h, m = jax.tree.map(transposed, (x, h, m))
    ones = jnp.ones(x.shape[1], x.dtype) if bias else None
    return _put_together(cell, x, ones, h, ones, m)


def _put_together(cell: Gated, x: Any, x_bias: Any, h: Any, h_bias: Any, m: Any) -> _Products:
    def stack(*parts: jax.Array | None) -> jax.Array:
        return jnp.concatenate([jnp.atleast_2d(part) for part in parts if part is not None])

    if keeps_apart(cell):
        return _Products(stack(x, x_bias), stack(h, h_bias), m)
    return _Products(None, stack(x, h, x_bias), m)


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())))


def _instantiate(tangent: Any) -> jax.Array:
    if isinstance(tangent, SymbolicZero):
        return jnp.zeros(tangent.shape, tangent.dtype)
    return tangent
