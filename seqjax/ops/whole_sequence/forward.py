"""The forward pass, with or without what the derivative needs."""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from seqjax.ops import elementwise
from seqjax.ops.elementwise import Saved, barrier
from seqjax.ops.gates import Gated, State, keeps_apart
from seqjax.ops.masking import where_valid, zero_padding
from seqjax.ops.precision import add_bias, cast_like, project, widen
from seqjax.ops.sharding import vary_like
from seqjax.ops.whole_sequence.chunks import (
    Plan,
    chunks_to_run,
    fill_chunks,
    lacking,
    split,
    steps_of_forward,
)


class Residuals(NamedTuple):
    """What the forward pass keeps for the derivative, in whole chunks."""

    before: State | None  # Leaves (steps, rows, features): the states that the steps start from.
    hs: jax.Array  # (steps, rows, features): h after every step, padding included.
    saved: Saved | None  # Leaves (steps, rows, hidden_size).


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def forward_and_save(
    plan: Plan, params: Any, state: State, xs: jax.Array, mask: jax.Array | None
) -> tuple[State, Residuals]:
    return forward(plan, params, state, xs, mask, save=True)


@forward_and_save.defjvp
def _forward_and_save_jvp(plan: Plan, primals: Any, tangents: Any) -> Any:
    """Second derivatives are those of a plain scan: only the first are made fast."""
    params, state, xs, mask = primals
    values = forward_and_save(plan, *primals)

    def plainly(params: Any, state: State, xs: jax.Array) -> tuple[State, Residuals]:
        return _save_plainly(plan, params, state, xs, mask)

    _, d_values = jax.jvp(plainly, (params, state, xs), tuple(tangents[:3]))
    return values, d_values


def forward(
    plan: Plan,
    params: Any,
    state: State,
    xs: jax.Array,
    mask: jax.Array | None,
    *,
    save: bool,
) -> tuple[State, Residuals]:
    """The final state and the residuals; or not saving them, in place of `hs` the outputs alone.

    Outputs are `hs` with zeros at padding.
    """
    length, rows, features = xs.shape
    skips = mask is not None
    steps = steps_of_forward(plan, length, rows, params.w_ih.shape[1], skips=skips)
    chunks = -(-length // steps)
    even = length % steps == 0
    # Where steps start in whole chunks, here and in what is saved: before are those that lack.
    own_start = lacking(length, steps) if plan.reverse else 0
    saved_start = lacking(length, plan.steps) if plan.reverse and save else 0
    order: jax.Array | None = None
    count: jax.Array | int = chunks
    if mask is not None:
        whole_mask = split(fill_chunks(mask, steps, plan.reverse), steps)
        order, count = chunks_to_run(whole_mask, plan.reverse)
    flat_xs = xs.reshape(length * rows, features)
    bias = input_bias(plan.cell, widen(params))

    def run_chunk(index: Any, loop: Any) -> Any:
        if order is not None:
            chunk = _at(order, index)
        else:
            chunk = chunks - 1 - index if plan.reverse else index
        first = chunk * steps - own_start
        # The chunk that lacks steps reads some of its neighbour's.
        start = first if even else jnp.clip(first, 0, length - steps)
        count = steps if even else steps - abs(first - start)
        valid = None if mask is None else _cut(mask, start, steps)
        inputs = _cut(flat_xs, start * rows, steps * rows)
        inputs = zero_padding(None if valid is None else valid.ravel(), inputs)
        from_xs = barrier(project(inputs, params.w_ih))

        def run_step(index: Any, loop: Any) -> Any:
            state, residuals = loop
            step = first + (steps - 1 - index if plan.reverse else index)
            valid_step = None if valid is None else _at(valid, step - start)
            from_x = _cut(from_xs, (step - start) * rows, rows)
            from_x = add_bias(from_x, bias)
            new_state, saved = _step(plan.cell, params, state, from_x, valid_step)
            h = new_state.h if save else zero_padding(valid_step, new_state.h)
            values = Residuals(state, h, saved) if save else Residuals(None, h, None)
            return new_state, jax.tree.map(_put(step + saved_start), residuals, values)

        unroll = min(plan.unroll, steps) if even else None
        return lax.fori_loop(0, count, run_step, loop, unroll=unroll)

    buffers = _buffers(plan, params, state, xs, save=save)
    loop = (state, vary_like(buffers, (state, xs, mask)))
    return run_chunk(0, loop) if chunks == 1 else lax.fori_loop(0, count, run_chunk, loop)


def _save_plainly(
    plan: Plan, params: Any, state: State, xs: jax.Array, mask: jax.Array | None
) -> tuple[State, Residuals]:
    """What `forward_and_save` computes, by a plain scan."""
    # As in `reference.scan`, and for its reasons.
    wide_params = vary_like(widen(params), (state, xs, mask))
    bias = input_bias(plan.cell, widen(params))

    def body(state: State, inputs: Any) -> Any:
        from_x, valid = inputs
        step_params = cast_like(wide_params, params)
        new_state, saved = _step(plan.cell, step_params, state, from_x, valid)
        return new_state, Residuals(state, new_state.h, saved)

    from_xs = add_bias(project(zero_padding(mask, xs), params.w_ih), bias)
    state, residuals = lax.scan(body, state, (from_xs, mask), reverse=plan.reverse)
    buffers = _buffers(plan, params, state, xs, save=True)
    start = lacking(len(xs), plan.steps) if plan.reverse else 0
    put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
    return state, jax.tree.map(put, buffers, residuals)


def input_bias(cell: Gated, params: Any) -> jax.Array | None:
    """What is added to the inputs' product: b_ih, and b_hh unless it belongs to the state's."""
    return params.b_ih if keeps_apart(cell) else total(params.b_ih, params.b_hh)


def total(*terms: jax.Array | None) -> Any:
    """Of what is there; None of nothing."""
    there = [term for term in terms if term is not None]
    return functools.reduce(operator.add, there) if there else None


def _step(
    cell: Gated, params: Any, state: State, from_x: jax.Array, valid: jax.Array | None
) -> tuple[State, Saved]:
    from_h = project(state.h, params.w_hh, params.b_hh if keeps_apart(cell) else None)
    expanded = None if valid is None else valid[:, None]
    (wide_h, rest), saved = elementwise.step(cell, from_x, from_h, state, expanded)
    h = wide_h.astype(state.h.dtype)
    weight = cell.projection(params)
    if weight is not None:
        h = project(h, weight).astype(state.h.dtype)
    elif h.dtype == wide_h.dtype and not rest:  # It is saved as that.
        saved = tuple(None if gate is wide_h else gate for gate in saved)
    return State(h if valid is None else where_valid(valid, h, state.h), rest), saved


def _at(array: jax.Array, index: Any) -> jax.Array:
    """`array[index]`, without the arithmetic that lets an index be negative."""
    return lax.dynamic_index_in_dim(array, index, keepdims=False, allow_negative_indices=False)


def _cut(array: jax.Array, start: Any, size: Any) -> jax.Array:
    """`array[start : start + size]`, as `_at`."""
    return lax.dynamic_slice_in_dim(array, start, size, allow_negative_indices=False)


def _put(step: Any) -> Any:
    """Writes a value into a buffer at this index of the leading axis."""
    return lambda buffer, value: _put_along(0)(buffer, value, jnp.asarray(step))


@functools.cache
def _put_along(axis: int) -> Any:
    # Mapped by JAX's rule, an update becomes a scatter, even where all are at one index.
    @custom_vmap
    def put(buffer: jax.Array, value: jax.Array, step: jax.Array) -> jax.Array:
        return lax.dynamic_update_index_in_dim(
            buffer, value, step, axis, allow_negative_indices=False
        )

    @put.def_vmap
    def _put_mapped(axis_size: int, in_batched: Any, *args: jax.Array) -> Any:
        *arrays, step = args
        assert not in_batched[2], "chunks_to_run gives all mapped sequences one order"
        buffer, value = (
            array if batched else jnp.broadcast_to(array, (axis_size, *array.shape))
            for array, batched in zip(arrays, in_batched[:2], strict=True)
        )
        return _put_along(axis + 1)(buffer, value, step), True

    return put


def _buffers(plan: Plan, params: Any, state: State, xs: jax.Array, *, save: bool) -> Residuals:
    """What the loops write to.

    What is saved of steps that are not run is multiplied with zeros: one half, since `combine` may
    divide by it, or take its logarithm.
    """
    length = len(xs)
    if not save:
        return Residuals(None, jnp.zeros((length, *state.h.shape), state.h.dtype), None)

    def residuals_of_step(params: Any, state: State, xs: jax.Array) -> Residuals:
        new_state, saved = _step(plan.cell, params, state, project(xs[0], params.w_ih), None)
        return Residuals(state, new_state.h, saved)

    steps = length + lacking(length, plan.steps)
    return jax.tree.map(
        lambda leaf: jnp.full((steps, *leaf.shape), 0.5, leaf.dtype),
        jax.eval_shape(residuals_of_step, params, state, xs),
    )
