"""`implementation="xla"`: a whole sequence at once, in the operations that XLA makes fast.

Forward, the inputs' products are formed for a chunk of steps at a time, which stays in the cache,
and the loop over a chunk's steps is left with one product and the cell's elementwise part.

The derivative is written down as what it is, a recurrence that is linear in the tangents, over the
gates that the forward pass saved. JAX runs it as it stands for forward mode and transposes it for
reverse mode. There the loop has one product a step again, and the gradients of the weights are one
product a chunk, where differentiating the plain scan would add up a full gradient at every step.
The derivative is itself made of differentiable parts, so every order and mode works.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from seqjax.ops.kernel import Kernel, Saved, State, barrier
from seqjax.ops.masking import where_valid, zero_padding
from seqjax.ops.precision import accumulation_dtype, cast_like, project, widen
from seqjax.ops.sharding import vary_like

ROWS_PER_CHUNK = 1024
"""About so many rows of inputs (steps times batch) are multiplied at a time."""


class Plan(NamedTuple):
    """What is known when tracing."""

    kernel: Kernel
    steps: int  # Steps a chunk: a divisor of the number of steps.
    reverse: bool
    unroll: int


class Residuals(NamedTuple):
    """What the forward pass keeps for the derivative."""

    hs: jax.Array  # (T, rows, features): h after every step, padding included.
    cs: jax.Array | None  # (T, rows, hidden_size)
    saved: Saved  # Leaves (T, rows, features).
    starts: (
        Any  # A State with leaves (chunks, rows, features): the state in which a chunk is entered.
    )


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
    rows = functools.reduce(lambda a, b: a * b, batch, 1)
    flat = functools.partial(_with_batch, batch, (rows,))
    state = jax.tree.map(functools.partial(flat, 0), state)
    xs = flat(1, xs)
    mask = None if mask is None else flat(1, mask)
    state, xs, mask = vary_like((state, xs, mask), (state, xs, mask, params))

    steps = steps_per_chunk(length, rows, mask is not None)
    whole = length - length % max(steps, 1)
    pieces = [piece for piece in [(0, whole, steps), (whole, length, length - whole)] if piece[2]]
    ys = [] if pieces else [jnp.zeros((0, *state.h.shape), state.h.dtype)]
    for start, stop, piece_steps in reversed(pieces) if reverse else pieces:
        plan = Plan(kernel, piece_steps, reverse, unroll)
        piece_mask = None if mask is None else mask[start:stop]
        state, piece_ys = _run(plan, params, state, xs[start:stop], piece_mask)
        ys.append(piece_ys)
    outputs = ys[0] if len(ys) == 1 else jnp.concatenate(ys[::-1] if reverse else ys)
    back = functools.partial(_with_batch, (rows,), batch)
    return jax.tree.map(functools.partial(back, 0), state), back(1, outputs)


def steps_per_chunk(length: int, rows: Any, masked: bool) -> int:
    """Steps that make some `ROWS_PER_CHUNK` rows, if possible a divisor of `length`.

    Chunks of padding alone are skipped, so a masked sequence has some 16 of them at least.
    """
    wanted = max(1, ROWS_PER_CHUNK // max(rows, 1)) if isinstance(rows, int) else 16
    if masked:
        wanted = min(wanted, max(16, length // 16))
    if wanted >= length:
        return length
    divisors = [d for d in range((wanted + 1) // 2, 2 * wanted + 1) if length % d == 0]
    return min(divisors, key=lambda d: max(d / wanted, wanted / d), default=wanted)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _run(
    plan: Plan, params: Any, state: State, xs: jax.Array, mask: jax.Array | None
) -> tuple[State, jax.Array]:
    state, residuals = _forward(plan, params, state, xs, mask, save=False)
    return state, zero_padding(mask, residuals.hs)


@functools.partial(_run.defjvp, symbolic_zeros=True)
def _run_jvp(plan: Plan, primals: Any, tangents: Any) -> Any:
    params, _, xs, mask = primals
    new_state, residuals = _forward_and_save(plan, *primals)
    d_state, d_hs = _tangents(plan, params, xs, mask, residuals, *tangents[:3])
    values = new_state, zero_padding(mask, residuals.hs)
    return values, cast_like((d_state, zero_padding(mask, d_hs)), values)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _forward_and_save(
    plan: Plan, params: Any, state: State, xs: jax.Array, mask: jax.Array | None
) -> tuple[State, Residuals]:
    return _forward(plan, params, state, xs, mask, save=True)


@_forward_and_save.defjvp
def _forward_and_save_jvp(plan: Plan, primals: Any, tangents: Any) -> Any:
    """Second derivatives are those of a plain scan: only the first are made fast."""
    params, state, xs, mask = primals
    values = _forward_and_save(plan, *primals)

    def plainly(params: Any, state: State, xs: jax.Array) -> tuple[State, Residuals]:
        return _save_plainly(plan, params, state, xs, mask)

    _, d_values = jax.jvp(plainly, (params, state, xs), tuple(tangents[:3]))
    return values, d_values


def _forward(
    plan: Plan,
    params: Any,
    state: State,
    xs: jax.Array,
    mask: jax.Array | None,
    *,
    save: bool,
) -> tuple[State, Residuals]:
    """The final state, `hs`, and the rest of the residuals where asked to save them."""
    chunks = xs.shape[0] // plan.steps
    order, count = _chunks_to_run(plan, mask, chunks)

    def run_chunk(index: Any, loop: Any) -> Any:
        state, residuals = loop
        chunk = index if order is None else order[index]
        start = chunk * plan.steps
        if save:
            starts = jax.tree.map(_put(chunk), residuals.starts, state)
            residuals = residuals._replace(starts=starts)
        inputs = lax.dynamic_slice_in_dim(xs, start, plan.steps)
        from_xs = barrier(_project_inputs(plan.kernel, params, inputs))
        valid = None if mask is None else lax.dynamic_slice_in_dim(mask, start, plan.steps)

        def run_step(index: Any, loop: Any) -> Any:
            state, residuals = loop
            step = plan.steps - 1 - index if plan.reverse else index
            new_state, saved = _step(
                plan.kernel, params, state, from_xs[step], None if valid is None else valid[step]
            )
            put = _put(start + step)
            residuals = residuals._replace(hs=put(residuals.hs, new_state.h))
            if save:
                residuals = residuals._replace(
                    cs=jax.tree.map(put, residuals.cs, new_state.c),
                    saved=jax.tree.map(put, residuals.saved, saved),
                )
            return new_state, residuals

        unroll = min(plan.unroll, plan.steps)
        return lax.fori_loop(0, plan.steps, run_step, (state, residuals), unroll=unroll)

    shapes = jax.eval_shape(functools.partial(_save_plainly, plan), params, state, xs, mask)[1]
    buffers = jax.tree.map(_buffer, shapes if save else Residuals(shapes.hs, None, None, None))
    loop = (state, vary_like(buffers, (state, xs, mask)))
    return run_chunk(0, loop) if chunks == 1 else lax.fori_loop(0, count, run_chunk, loop)


def _save_plainly(
    plan: Plan, params: Any, state: State, xs: jax.Array, mask: jax.Array | None
) -> tuple[State, Residuals]:
    """What `_forward` computes, by a plain scan."""
    params_dtypes, params = params, widen(params)

    def body(state: State, inputs: Any) -> Any:
        from_x, valid = inputs
        step_params = cast_like(params, params_dtypes)
        new_state, saved = _step(plan.kernel, step_params, state, from_x, valid)
        return new_state, (state, new_state, saved)

    from_xs = _project_inputs(plan.kernel, cast_like(params, params_dtypes), xs)
    state, (before, after, saved) = lax.scan(body, state, (from_xs, mask), reverse=plan.reverse)
    first = plan.steps - 1 if plan.reverse else 0
    starts = jax.tree.map(lambda leaf: leaf[first :: plan.steps], before)
    return state, Residuals(after.h, after.c, saved, starts)


def _project_inputs(kernel: Kernel, params: Any, xs: jax.Array) -> jax.Array:
    """`xs @ w_ih` and the biases that belong to it, as one product: (steps, rows, gates)."""
    steps, rows, features = xs.shape
    bias = params.b_ih
    if bias is not None and not kernel.separate:
        bias = bias.astype(accumulation_dtype(bias.dtype)) + params.b_hh.astype(
            accumulation_dtype(bias.dtype)
        )
    product = project(xs.reshape(steps * rows, features), params.w_ih, bias)
    return product.reshape(steps, rows, product.shape[-1])


def _step(
    kernel: Kernel, params: Any, state: State, from_x: jax.Array, valid: jax.Array | None
) -> tuple[State, Saved]:
    from_h = project(state.h, params.w_hh, params.b_hh if kernel.separate else None)
    m, c, saved = kernel.step(from_x, from_h, state)
    h = m.astype(state.h.dtype)
    if _projection(params) is not None:
        h = project(h, params.w_hr).astype(state.h.dtype)
    new_state = State(h, c)
    return (new_state if valid is None else where_valid(valid, new_state, state)), saved


def _tangents(
    plan: Plan,
    params: Any,
    xs: jax.Array,
    mask: jax.Array | None,
    residuals: Residuals,
    d_params: Any,
    d_state: State,
    d_xs: Any,
) -> tuple[State, jax.Array]:
    """Tangents of the final state and of `hs`: a scan that is linear in the last three arguments.

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
    w_hr = _projection(params)

    # Recomputed in the backward pass, chunk by chunk and step by step: what is kept between the
    # passes are the residuals alone, and not every factor of the derivative.
    remat = functools.partial(jax.checkpoint, prevent_cse=False)

    @remat
    def run_step(d_state: State, inputs: Any) -> Any:
        before, after, saved, d_from_x, d_from_h, d_h, valid = inputs
        d_from_h = _plus(_dot(d_state.h, w_hh, 1, 1), d_from_h)
        d_m, d_c = kernel.tangent(saved, before, after, d_from_x, d_from_h, d_state)
        d_new = State(d_m if w_hr is None else _plus(d_m @ w_hr, d_h), d_c)
        if valid is not None:
            d_new = where_valid(valid, d_new, d_state)
        return d_new, d_new.h

    def run_chunk(d_state: State, inputs: Any) -> Any:
        x, d_x, valid, chunk = inputs
        after = State(chunk.hs, chunk.cs)
        before = jax.tree.map(functools.partial(_shift, plan.reverse), chunk.starts, after)
        d_from_x, d_from_h = _tangents_of_products(
            kernel, params, d_params if weights_move else None, widen(x), d_x, widen(before.h)
        )
        d_h = None
        if w_hr is not None and weights_move:
            hidden = kernel.hidden(chunk.saved, after)
            d_h = _product(hidden, d_params.w_hr)
        steps = (widen(before), widen(after), chunk.saved, d_from_x, d_from_h, d_h, valid)
        return lax.scan(run_step, d_state, steps, reverse=plan.reverse)

    @remat
    def run_chunk_unless_padding(d_state: State, inputs: Any) -> Any:
        if mask is None:
            return run_chunk(d_state, inputs[0])
        zeros = functools.partial(jnp.zeros, (plan.steps, *d_state.h.shape), d_state.h.dtype)
        skip = lambda d_state, _: (d_state, vary_like(zeros(), like))  # noqa: E731
        return lax.cond(inputs[1], run_chunk, skip, d_state, inputs[0])

    def split(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(chunks, plan.steps, *leaf.shape[1:])

    split_residuals = jax.tree.map(split, residuals._replace(starts=None))
    inputs = (
        *jax.tree.map(split, (xs, d_xs, mask)),
        split_residuals._replace(starts=residuals.starts),
    )
    active = None if mask is None else _any_row(mask.reshape(chunks, plan.steps * mask.shape[1]))
    d_state, d_hs = lax.scan(
        run_chunk_unless_padding,
        d_state,
        (inputs, active),
        reverse=plan.reverse,
        unroll=chunks if chunks == 1 else 1,
    )
    return d_state, d_hs.reshape(length, *d_hs.shape[2:])


def _tangents_of_products(
    kernel: Kernel, params: Any, d_params: Any, x: jax.Array, d_x: Any, h: jax.Array
) -> tuple[jax.Array | None, jax.Array | None]:
    """Tangents of a chunk's `from_x` and `from_h`, but for the part that comes with `d_h`.

    Where the cell adds up the two, so does this, in one product over inputs and states together.
    """
    d_from_x = None if d_x is None else _product(d_x, params.w_ih, transposed=False)
    if d_params is None:
        return (d_from_x, None) if kernel.separate else (None, d_from_x)
    if kernel.separate:
        d_from_x = _plus(_product(x, d_params.w_ih), d_from_x, d_params.b_ih)
        return d_from_x, _plus(_product(h, d_params.w_hh), d_params.b_hh)
    both = jnp.concatenate([x, h], axis=-1)
    d_weights = jnp.concatenate([d_params.w_ih, d_params.w_hh])
    return None, _plus(_product(both, d_weights), d_from_x, d_params.b_ih, d_params.b_hh)


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


def _shift(reverse: bool, start: jax.Array, after: jax.Array) -> jax.Array:
    """The states before a chunk's steps, from those after them and the one it is entered in."""
    if reverse:
        return jnp.concatenate([after[1:], start[None]])
    return jnp.concatenate([start[None], after[:-1]])


def _chunks_to_run(
    plan: Plan, mask: jax.Array | None, chunks: int
) -> tuple[jax.Array | None, jax.Array | int]:
    """The indices of the chunks in the order of running, and how many of them to run.

    A chunk of padding alone changes no state, so it is left out. No order means 0, 1, 2, …
    """
    forward = jnp.arange(chunks)
    if mask is None:
        return (forward[::-1] if plan.reverse else None), chunks
    active = _any_row(mask.reshape(chunks, plan.steps * mask.shape[1]))
    active = active[::-1] if plan.reverse else active
    (order,) = jnp.nonzero(active, size=chunks, fill_value=0)
    return (chunks - 1 - order if plan.reverse else order), active.sum()


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


def _put(index: Any) -> Any:
    return lambda buffer, value: lax.dynamic_update_index_in_dim(buffer, value, index, 0)


def _buffer(shape: jax.ShapeDtypeStruct) -> jax.Array:
    # Without the barrier XLA makes one array of zeros for several buffers, and then copies of it.
    return barrier(jnp.zeros(shape.shape, shape.dtype))


def _projection(params: Any) -> jax.Array | None:
    return getattr(params, "w_hr", None)


def _instantiate(tangent: Any) -> jax.Array:
    if isinstance(tangent, SymbolicZero):
        return jnp.zeros(tangent.shape, tangent.dtype)
    return tangent


def _with_batch(old: Any, new: Any, axis: int, leaf: jax.Array) -> jax.Array:
    """`leaf` with the batch dimensions `new` in place of `old`, which start at `axis`."""
    if len(old) == len(new):
        return leaf
    return leaf.reshape(*leaf.shape[:axis], *new, *leaf.shape[axis + len(old) :])
