"""The forward pass, with or without what the derivative needs."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from seqjax.ops.kernel import Kernel, Saved, State, barrier
from seqjax.ops.masking import where_valid, zero_padding
from seqjax.ops.precision import cast_like, project, widen
from seqjax.ops.sharding import vary_like
from seqjax.ops.whole_sequence.chunks import Plan, chunks_to_run


class Residuals(NamedTuple):
    """What the forward pass keeps for the derivative."""

    hs: jax.Array  # (T, rows, features): h after every step, padding included.
    cs: jax.Array | None  # (T, rows, hidden_size): c before every step.
    saved: Saved  # Leaves (T, rows, features).
    starts: jax.Array | None  # (chunks, rows, features): h with which a chunk is entered.


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
    chunks = xs.shape[0] // plan.steps
    order, count = chunks_to_run(plan, mask, chunks)

    def run_chunk(index: Any, loop: Any) -> Any:
        state, residuals = loop
        chunk = index if order is None else order[index]
        start = chunk * plan.steps
        if save:
            residuals = residuals._replace(starts=_put(chunk)(residuals.starts, state.h))
        inputs = lax.dynamic_slice_in_dim(xs, start, plan.steps)
        from_xs = barrier(_project_inputs(plan.kernel, params, inputs))
        valid = None if mask is None else lax.dynamic_slice_in_dim(mask, start, plan.steps)

        def run_step(index: Any, loop: Any) -> Any:
            state, residuals = loop
            step = plan.steps - 1 - index if plan.reverse else index
            valid_step = None if valid is None else valid[step]
            new_state, saved = _step(plan.kernel, params, state, from_xs[step], valid_step)
            put = _put(start + step)
            h = new_state.h if save else zero_padding(valid_step, new_state.h)
            residuals = residuals._replace(hs=put(residuals.hs, h))
            if save:
                residuals = residuals._replace(
                    cs=jax.tree.map(put, residuals.cs, state.c),
                    saved=jax.tree.map(put, residuals.saved, saved),
                )
            return new_state, residuals

        unroll = min(plan.unroll, plan.steps)
        return lax.fori_loop(0, plan.steps, run_step, (state, residuals), unroll=unroll)

    buffers = _buffers(plan, params, state, xs, save=save)
    loop = (state, vary_like(buffers, (state, xs, mask)))
    return run_chunk(0, loop) if chunks == 1 else lax.fori_loop(0, count, run_chunk, loop)


def _save_plainly(
    plan: Plan, params: Any, state: State, xs: jax.Array, mask: jax.Array | None
) -> tuple[State, Residuals]:
    """What `forward_and_save` computes, by a plain scan."""
    wide_params = widen(params)

    def body(state: State, inputs: Any) -> Any:
        from_x, valid = inputs
        step_params = cast_like(wide_params, params)
        new_state, saved = _step(plan.kernel, step_params, state, from_x, valid)
        return new_state, (state, new_state, saved)

    from_xs = _project_inputs(plan.kernel, params, xs)
    state, (before, after, saved) = lax.scan(body, state, (from_xs, mask), reverse=plan.reverse)
    first = plan.steps - 1 if plan.reverse else 0
    return state, Residuals(after.h, before.c, saved, before.h[first :: plan.steps])


def _project_inputs(kernel: Kernel, params: Any, xs: jax.Array) -> jax.Array:
    """`xs @ w_ih` and the biases that belong to it, as one product: (steps, rows, gates)."""
    steps, rows, features = xs.shape
    bias = params.b_ih
    if bias is not None and not kernel.separate:
        bias = widen(bias) + widen(params.b_hh)
    product = project(xs.reshape(steps * rows, features), params.w_ih, bias)
    return product.reshape(steps, rows, product.shape[-1])


def _step(
    kernel: Kernel, params: Any, state: State, from_x: jax.Array, valid: jax.Array | None
) -> tuple[State, Saved]:
    from_h = project(state.h, params.w_hh, params.b_hh if kernel.separate else None)
    m, c, saved = kernel.step(from_x, from_h, state, None if valid is None else valid[:, None])
    h = m.astype(state.h.dtype)
    if projection(params) is not None:
        h = project(h, params.w_hr).astype(state.h.dtype)
    return State(h if valid is None else where_valid(valid, h, state.h), c), saved


def _put(index: Any) -> Any:
    """Writes a value into a buffer at this index of the leading axis."""
    put = _put_along(0)
    return lambda buffer, value: put(buffer, value, jnp.asarray(index))


def _put_along(axis: int) -> Any:
    # Mapped by JAX's rule, an update becomes a scatter, even where all are at one index.
    @custom_vmap
    def put(buffer: jax.Array, value: jax.Array, index: jax.Array) -> jax.Array:
        return lax.dynamic_update_index_in_dim(buffer, value, index, axis)

    @put.def_vmap
    def _put_mapped(axis_size: int, in_batched: Any, *args: jax.Array) -> Any:
        *arrays, index = args
        assert not in_batched[2], "chunks_to_run gives all mapped sequences one order"
        buffer, value = (
            array if batched else jnp.broadcast_to(array, (axis_size, *array.shape))
            for array, batched in zip(arrays, in_batched[:2], strict=True)
        )
        return _put_along(axis + 1)(buffer, value, index), True

    return put


def _buffers(plan: Plan, params: Any, state: State, xs: jax.Array, *, save: bool) -> Residuals:
    """What the loops write to. Only `hs` is read where nothing was written."""
    length = xs.shape[0]
    hs = jnp.zeros((length, *state.h.shape), state.h.dtype)
    if not save:
        return Residuals(hs, None, None, None)

    def first_step(x: jax.Array) -> tuple[jax.Array | None, Saved]:
        from_x = _project_inputs(plan.kernel, params, x)[0]
        new_state, saved = _step(plan.kernel, params, state, from_x, None)
        return new_state.c, saved

    leaves, structure = jax.tree.flatten(jax.eval_shape(first_step, xs[:1]))
    # Each holds another number: of equal arrays XLA makes one, and then copies of it.
    buffers = [
        jnp.full((length, *leaf.shape), number, leaf.dtype)
        for number, leaf in enumerate(leaves, start=1)
    ]
    cs, saved = jax.tree.unflatten(structure, buffers)
    return Residuals(hs, cs, saved, jnp.zeros((length // plan.steps, *state.h.shape), hs.dtype))


def projection(params: Any) -> jax.Array | None:
    return getattr(params, "w_hr", None)
