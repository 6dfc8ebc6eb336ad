"""The derivative: a recurrence that is linear in the tangents, over the gates that were saved."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from seqjax.ops.kernel import Kernel, State, barrier
from seqjax.ops.masking import where_valid, zero_padding
from seqjax.ops.precision import widen
from seqjax.ops.sharding import vary_like
from seqjax.ops.whole_sequence.chunks import Plan, active_chunks
from seqjax.ops.whole_sequence.forward import Residuals, projection


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
    kernel, length = plan.kernel, xs.shape[0]
    chunks = length // plan.steps
    weights_move = not all(isinstance(leaf, SymbolicZero) for leaf in jax.tree.leaves(d_params))
    d_params, d_state = widen(jax.tree.map(_instantiate, (d_params, d_state)))
    d_xs = None if isinstance(d_xs, SymbolicZero) else widen(d_xs)
    params = widen(params)
    # Inside of jax.shard_map the sum over devices belongs after the loop, not into each step.
    like = (xs, mask, residuals)
    params, d_params, d_state = vary_like((params, d_params, d_state), like)
    # Transposed for the backward loop once, and not at every step of it.
    w_hh = barrier(params.w_hh.T)
    w_hr = projection(params)
    d_weights = _stack(kernel, d_params) if weights_move else None

    # Recomputed in the backward pass, chunk by chunk and step by step: what is kept between the
    # passes are the residuals alone, and not every factor of the derivative.
    remat = functools.partial(jax.checkpoint, prevent_cse=False)

    @remat
    def run_step(d_state: State, inputs: Any) -> Any:
        factors, d_from_x, d_from_h, d_h, valid = inputs
        d_from_h = _plus(_dot(d_state.h, w_hh, 1, 1), d_from_h)
        d_m, d_c = kernel.tangent(factors, d_from_x, d_from_h, d_state)
        d_new = State(d_m if w_hr is None else _plus(d_m @ w_hr, d_h), d_c)
        if valid is not None:
            d_new = where_valid(valid, d_new, d_state)
        return d_new, zero_padding(valid, d_new.h)

    def run_chunk(d_state: State, inputs: Any) -> Any:
        x, d_x, valid, chunk = inputs
        before = widen(chunk.before)
        d_from_x, d_from_h = _tangents_of_products(
            kernel, params, d_weights, widen(x), d_x, before.h
        )
        d_h = None
        if w_hr is not None and d_weights is not None:
            d_h = _product(kernel.hidden(chunk.saved, before), d_weights.w_hr)
        factors = kernel.factors(chunk.saved, before, widen(chunk.hs))
        steps = (factors, d_from_x, d_from_h, d_h, valid)
        return lax.scan(run_step, d_state, steps, reverse=plan.reverse)

    def skip_chunk(d_state: State, _: Any) -> Any:
        d_hs = jnp.zeros((plan.steps, *d_state.h.shape), d_state.h.dtype)
        return d_state, vary_like(d_hs, like)

    @remat
    def run_chunk_unless_padding(d_state: State, inputs: Any) -> Any:
        if mask is None:
            return run_chunk(d_state, inputs[0])
        return lax.cond(inputs[1], run_chunk, skip_chunk, d_state, inputs[0])

    def split(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(chunks, plan.steps, *leaf.shape[1:])

    inputs = jax.tree.map(split, (xs, d_xs, mask, residuals))
    active = None if mask is None else active_chunks(plan, mask)
    d_state, d_hs = lax.scan(
        run_chunk_unless_padding, d_state, (inputs, active), reverse=plan.reverse
    )
    return d_state, d_hs.reshape(length, *d_hs.shape[2:])


class _Weights(NamedTuple):
    """Tangents of the parameters, as they are multiplied: each a bias below its weights."""

    of_x: jax.Array | None
    of_h: jax.Array | None
    of_both: jax.Array | None  # In place of the two where the cell adds up their products.
    w_hr: jax.Array | None


def _stack(kernel: Kernel, d_params: Any) -> _Weights:
    """The weights' tangents, put together before the loop, so that it sums few gradients."""
    b_ih, b_hh = d_params.b_ih, d_params.b_hh
    w_hr = projection(d_params)
    if kernel.separate:
        return _Weights(_rows(d_params.w_ih, b_ih), _rows(d_params.w_hh, b_hh), None, w_hr)
    bias = None if b_ih is None else b_ih + b_hh
    return _Weights(None, None, _rows(d_params.w_ih, d_params.w_hh, bias), w_hr)


def _rows(*parts: jax.Array | None) -> jax.Array:
    """Matrices below each other, a bias as one row more."""
    return jnp.concatenate([jnp.atleast_2d(part) for part in parts if part is not None])


def _tangents_of_products(
    kernel: Kernel, params: Any, d_weights: _Weights | None, x: jax.Array, d_x: Any, h: jax.Array
) -> tuple[jax.Array | None, jax.Array | None]:
    """Tangents of a chunk's `from_x` and `from_h`, but for the part that comes with `d_h`.

    Where the cell adds up the two, so does this, in one product over inputs and states together.
    """
    d_from_x = None if d_x is None else _product(d_x, params.w_ih, transposed=False)
    if not kernel.separate:
        if d_weights is None:
            return None, d_from_x
        return None, _plus(_product(_columns(params, x, h), d_weights.of_both), d_from_x)
    if d_weights is None:
        if d_from_x is None:
            d_from_x = jnp.zeros((*x.shape[:2], params.w_ih.shape[1]), x.dtype)
        return d_from_x, None
    d_from_x = _plus(_product(_columns(params, x), d_weights.of_x), d_from_x)
    return d_from_x, _product(_columns(params, h), d_weights.of_h)


def _columns(params: Any, *parts: jax.Array) -> jax.Array:
    """Inputs and states side by side, and ones for the bias, if there is one."""
    ones = () if params.b_ih is None else (jnp.ones((*parts[0].shape[:2], 1), parts[0].dtype),)
    return jnp.concatenate([*parts, *ones], axis=-1)


def _product(values: jax.Array, weight: jax.Array, transposed: bool = True) -> jax.Array:
    """`values @ weight`, (steps, rows, features), arranged for the gradient of one of the two.

    The gradient of the weight is `values.T @ gradient`: XLA's product is fastest with the transpose
    written out, which a barrier makes it do.
    """
    steps, rows, features = values.shape
    flat = values.reshape(steps * rows, features)
    product = _dot(barrier(flat.T), weight, 0, 0) if transposed else flat @ weight
    return product.reshape(steps, rows, product.shape[-1])


def _dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())))


def _plus(first: jax.Array, *others: jax.Array | None) -> jax.Array:
    """The sum of what is there."""
    return functools.reduce(lambda a, b: a if b is None else a + b, others, first)


def _instantiate(tangent: Any) -> jax.Array:
    if isinstance(tangent, SymbolicZero):
        return jnp.zeros(tangent.shape, tangent.dtype)
    return tangent
