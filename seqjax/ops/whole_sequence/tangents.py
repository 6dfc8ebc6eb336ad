"""The derivative: a recurrence that is linear in the tangents, over the gates that were saved."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from seqjax.ops.kernel import Kernel, Saved, State, barrier
from seqjax.ops.masking import where_valid, zero_padding
from seqjax.ops.precision import widen
from seqjax.ops.sharding import vary_like
from seqjax.ops.whole_sequence.chunks import Plan, active_chunks, merge, split
from seqjax.ops.whole_sequence.forward import Residuals, projection, total


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
    kernel = plan.kernel
    weights_move = not all(isinstance(leaf, SymbolicZero) for leaf in jax.tree.leaves(d_params))
    d_params, d_state = widen(jax.tree.map(_instantiate, (d_params, d_state)))
    d_xs = None if isinstance(d_xs, SymbolicZero) else widen(d_xs)
    params = widen(params)
    # Inside of jax.shard_map the sum over devices belongs after the loop, not into each step.
    like = (xs, mask, residuals)
    params, d_params, d_state = vary_like((params, d_params, d_state), like)
    # Transposed for the backward loop once, and not at every step of it. Large weights are not:
    # the copy takes longer than what it saves.
    w_hh = params.w_hh.T if plan.large else barrier(params.w_hh.T)
    w_hr = projection(params)
    d_weights = _weights(plan, d_params) if weights_move else None

    # Recomputed in the backward pass, chunk by chunk and step by step: what is kept between the
    # passes are the residuals alone, and not every factor of the derivative.
    remat = functools.partial(jax.checkpoint, prevent_cse=False)

    @remat
    def run_step(d_state: State, inputs: Any) -> Any:
        factors, d_from_x, d_from_h, d_h, valid = inputs
        d_from_h = total(_dot(d_state.h, w_hh, 1, 1), d_from_h)
        d_m, d_c = kernel.tangent(factors, d_from_x, d_from_h, d_state)
        d_new = State(d_m if w_hr is None else total(d_m @ w_hr, d_h), d_c)
        if valid is not None:
            d_new = where_valid(valid, d_new, d_state)
        return d_new, zero_padding(valid, d_new.h)

    @remat
    def run_chunk(d_state: State, inputs: Any) -> Any:
        x, d_x, valid, chunk, active = inputs
        before = widen(chunk.before)
        # All that is not linear stays outside of the condition: differentiated, a condition copies
        # what enters it.
        factors = kernel.factors(chunk.saved, before, widen(chunk.hs))
        values = None
        if d_weights is not None:
            values = _values(plan, params, widen(zero_padding(valid, x)), before, chunk.saved)

        def run(d_state: State) -> Any:
            products = _tangents_of_products(kernel, params, d_weights, values, d_x, x.shape[:2])
            steps = (factors, *products, valid)
            return lax.scan(run_step, d_state, steps, reverse=plan.reverse)

        def skip(d_state: State) -> Any:
            d_hs = jnp.zeros((plan.steps, *d_state.h.shape), d_state.h.dtype)
            return d_state, vary_like(d_hs, like)

        return run(d_state) if active is None else lax.cond(active, run, skip, d_state)

    inputs = jax.tree.map(lambda leaf: split(leaf, plan.steps), (xs, d_xs, mask, residuals))
    active = None if mask is None else active_chunks(inputs[2])
    d_state, d_hs = lax.scan(run_chunk, d_state, (*inputs, active), reverse=plan.reverse)
    return d_state, merge(d_hs)


class _Operands(NamedTuple):
    """Of the products with weights: the weights, or what they multiply, transposed.

    Small weights are put below each other, biases too, which multiply ones: few gradients to sum,
    and few products. Of large ones, each is by itself, so that their gradients need not be cut.
    """

    with_x: list[jax.Array]
    with_h: list[jax.Array]  # Unless the cell needs `from_x` and `from_h` apart, the inputs', too.
    with_m: list[jax.Array]  # The projection's.


def _weights(plan: Plan, params: Any) -> _Operands:
    """Put together before the loop."""
    w_ih, w_hh, b_ih, b_hh = params.w_ih, params.w_hh, params.b_ih, params.b_hh
    w_hr = projection(params)
    with_m = [] if w_hr is None else [w_hr]
    if plan.kernel.separate:
        return _Operands(_put_together(plan, w_ih, b_ih), _put_together(plan, w_hh, b_hh), with_m)
    bias = None if b_ih is None else b_ih + b_hh
    return _Operands([], _put_together(plan, w_ih, w_hh, bias), with_m)


def _values(plan: Plan, params: Any, x: jax.Array, before: State, saved: Saved) -> _Operands:
    """Of a chunk. A weight's gradient is `values @ gradient`.

    XLA's product is fastest with the transpose written out, and writes least if the parts are
    transposed before they are put together. The barriers make it do so.
    """

    def transposed(values: jax.Array) -> jax.Array:
        steps, rows, features = values.shape
        return barrier(values.reshape(steps * rows, features).T)

    x, h = transposed(x), transposed(before.h)
    ones = None if params.b_ih is None else jnp.ones(x.shape[1], x.dtype)
    m = [] if projection(params) is None else [transposed(plan.kernel.hidden(saved, before))]
    if plan.kernel.separate:
        return _Operands(_put_together(plan, x, ones), _put_together(plan, h, ones), m)
    return _Operands([], _put_together(plan, x, h, ones), m)


def _put_together(plan: Plan, *parts: jax.Array | None) -> list[jax.Array]:
    rows = [jnp.atleast_2d(part) for part in parts if part is not None]
    return rows if plan.large else [barrier(jnp.concatenate(rows))]


def _tangents_of_products(
    kernel: Kernel,
    params: Any,
    d_weights: _Operands | None,
    values: _Operands | None,
    d_x: jax.Array | None,
    shape: tuple[int, int],
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
    """Tangents of a chunk's `from_x`, `from_h` and projected h, but for what comes with `d_h`.

    Where the cell adds up the first two, the second is of their sum.
    """
    with_x, with_h, with_m = _Operands([], [], [])
    if d_weights is not None:

        def multiply(values: jax.Array, weights: jax.Array) -> jax.Array:
            return _dot(values, weights, 0, 0).reshape(*shape, weights.shape[-1])

        with_x, with_h, with_m = jax.tree.map(multiply, values, d_weights)
    from_x = [] if d_x is None else [d_x @ params.w_ih]
    if not kernel.separate:
        return None, total(*with_h, *from_x), total(*with_m)
    d_from_x = total(*with_x, *from_x)
    if d_from_x is None:
        d_from_x = jnp.zeros((*shape, params.w_ih.shape[1]), params.w_ih.dtype)
    return d_from_x, total(*with_h), total(*with_m)


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())))


def _instantiate(tangent: Any) -> jax.Array:
    if isinstance(tangent, SymbolicZero):
        return jnp.zeros(tangent.shape, tangent.dtype)
    return tangent
