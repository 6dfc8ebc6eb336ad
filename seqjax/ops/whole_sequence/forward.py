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
from seqjax.ops.precision import cast_like, project, widen
from seqjax.ops.sharding import vary_like
from seqjax.ops.whole_sequence.chunks import Plan, chunks_to_run, merge, split, steps_of_forward


class Residuals(NamedTuple):
    """What the forward pass keeps for the derivative."""

    before: State | None  # Leaves (T, rows, features): the states that the steps start from.
    hs: jax.Array  # (T, rows, features): h after every step, padding included.
    saved: Saved | None  # Leaves (T, rows, hidden_size).


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
    buffers = _buffers(plan, params, state, xs, mask, save=save)
    steps = steps_of_forward(plan, length, rows, params.w_ih.shape[1])
    chunks = length // steps
    order: jax.Array | None = None
    count: jax.Array | int = chunks
    if mask is not None:
        mask = split(mask, steps)
        if plan.skips:
            order, count = chunks_to_run(mask, plan.reverse)
    # In two: reshaped so at once, no array would do that vmap maps over an explicit mesh axis.
    split_xs = split(xs, steps).reshape(chunks, steps * rows, features)
    bias = input_bias(plan.cell, widen(params))

    def run_chunk(index: Any, loop: Any) -> Any:
        if order is not None:
            chunk = _at(order, index)
        else:
            chunk = chunks - 1 - index if plan.reverse else index
        valid = None if mask is None else _at(mask, chunk)
        padding = valid.ravel() if valid is not None and plan.skips else None
        inputs = zero_padding(padding, _at(split_xs, chunk))
        from_xs = barrier(project(inputs, params.w_ih))

        def run_step(index: Any, loop: Any) -> Any:
            state, residuals = loop
            step = steps - 1 - index if plan.reverse else index
            valid_step = None if valid is None else _at(valid, step)
            from_x = lax.dynamic_slice_in_dim(
                from_xs, step * rows, rows, allow_negative_indices=False
            )
            new_state, saved = _step(plan.cell, params, state, total(from_x, bias), valid_step)
            h = zero_padding(valid_step, new_state.h) if plan.skips and not save else new_state.h
            values = Residuals(state, h, saved) if save else Residuals(None, h, None)
            return new_state, jax.tree.map(_put(chunk, step), residuals, values)

        return lax.fori_loop(0, steps, run_step, loop, unroll=min(plan.unroll, steps))

    buffers = jax.tree.map(lambda leaf: split(leaf, steps), buffers)
    buffers = vary_like(buffers, (state, xs, mask))
    loop = (state, buffers)
    state, residuals = (
        run_chunk(0, loop) if chunks == 1 else lax.fori_loop(0, count, run_chunk, loop)
    )
    return state, jax.tree.map(merge, residuals)


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

    from_xs = total(project(zero_padding(mask, xs), params.w_ih), bias)
    return lax.scan(body, state, (from_xs, mask), reverse=plan.reverse)


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


def _put(chunk: Any, step: Any) -> Any:
    """Writes a value into a buffer at these indices of the two leading axes."""
    indices = (jnp.asarray(chunk), jnp.asarray(step))
    return lambda buffer, value: _put_along(0)(buffer, value, *indices)


@functools.cache
def _put_along(axis: int) -> Any:
    # Mapped by JAX's rule, an update becomes a scatter, even where all are at one index.
    @custom_vmap
    def put(buffer: jax.Array, value: jax.Array, chunk: jax.Array, step: jax.Array) -> jax.Array:
        start = [chunk if i == axis else step if i == axis + 1 else 0 for i in range(buffer.ndim)]
        value = jnp.expand_dims(value, (axis, axis + 1))
        return lax.dynamic_update_slice(buffer, value, start, allow_negative_indices=False)

    @put.def_vmap
    def _put_mapped(axis_size: int, in_batched: Any, *args: jax.Array) -> Any:
        *arrays, chunk, step = args
        assert not any(in_batched[2:]), "chunks_to_run gives all mapped sequences one order"
        buffer, value = (
            array if batched else jnp.broadcast_to(array, (axis_size, *array.shape))
            for array, batched in zip(arrays, in_batched[:2], strict=True)
        )
        return _put_along(axis + 1)(buffer, value, chunk, step), True

    return put


def _buffers(
    plan: Plan, params: Any, state: State, xs: jax.Array, mask: jax.Array | None, *, save: bool
) -> Residuals:
    """What the loops write to.

    Where chunks were left out, only `hs` is read for its values. But a second derivative passes by
    what is saved there: one half, since `combine` may divide by a gate, or take its logarithm.
    """
    if not save:
        return Residuals(None, jnp.zeros((len(xs), *state.h.shape), state.h.dtype), None)
    run = functools.partial(_save_plainly, plan)
    _, (before, hs, saved) = jax.eval_shape(run, params, state, xs, mask)

    def filled_with(number: float, leaves: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.full(leaf.shape, number, leaf.dtype), leaves)

    before, hs = filled_with(0, (before, hs))
    return Residuals(before, hs, filled_with(0.5, saved))
