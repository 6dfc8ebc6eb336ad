"""`scan`: run any layer over a sequence."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from seqjax.cells.base import (
    Carry,
    CarryT,
    Layer,
    Params,
    ParamsT,
    check_layer,
    check_type,
    run_layer,
)
from seqjax.cells.checks import as_array, check_carry, check_input, initial_carry
from seqjax.ops.dispatch import check_implementation
from seqjax.ops.masking import where_valid
from seqjax.ops.sharding import shard_like

__all__ = ["scan"]
__dir__ = __all__.copy  # What dir() and tab completion show.


def scan(
    layer: Layer[ParamsT, CarryT],
    params: ParamsT,
    xs: jax.Array,
    carry: CarryT | None = None,
    *,
    mask: jax.Array | None = None,
    reverse: bool = False,
    key: jax.Array | None = None,
    unroll: int = 1,
    implementation: str | None = None,
    remat: bool = False,
) -> tuple[CarryT, jax.Array]:
    """Runs a layer over a sequence: `carry, y_t = layer.step(params, carry, x_t)` for every t.

    Where the mask is off, the step is padding: it leaves the carry as it was and emits zeros.
    That gives right padding, left padding, gaps and length 0, in both directions. What stands in
    padded inputs, NaN included, reaches neither values nor gradients.

    Args:
      layer: a cell, `Stack`, `Bidirectional` or a `Layer` of your own.
      params: its parameters, as from `layer.init`; or nested dicts and lists of arrays with the
        same names, as in a checkpoint that was restored without a target.
      xs: inputs, `(T, *batch, layer.input_size)`, in the parameters' floating dtype. No batch
        dimension means one sequence.
      carry: state before the first step, as from `layer.initial_carry(batch, xs.dtype)`; None
        means zeros.
      mask: bool `(T, *batch)`, True at valid steps; None means that all are. See
        `seqjax.lengths_to_mask`.
      reverse: run from the last step to the first. Outputs stay at their own time.
      key: random key. Given, the run is training and dropout is drawn from it; None: no dropout.
      unroll: steps per iteration of the loop, as in `jax.lax.scan`; above 1 it needs a T that is a
        number, not symbolic.
      implementation: "scan" (plain `jax.lax.scan`), "xla" (whole sequences with a derivative of its
        own, faster to train), or None for the best that applies.
      remat: in training, keep the state at every √T-th step and recompute the rest in the backward
        pass: for one more forward pass, memory grows with √T but for inputs and outputs. Of a
        symbolic T, every 32nd is kept.

    Returns:
      `(carry, ys)`: the state after the last valid step, and the outputs
      `(T, *batch, layer.output_size)` in the dtype of `xs`.

    Raises:
      TypeError: a dtype, a structure or an argument's type is wrong.
      ValueError: a shape is wrong, or the implementation unknown or not applicable.

    >>> import jax, seqjax
    >>> layer = seqjax.LSTMCell(input_size=3, hidden_size=5)
    >>> params = layer.init(jax.random.key(0))
    >>> mask = seqjax.lengths_to_mask(jax.numpy.array([7, 4]), 7)
    >>> carry, ys = seqjax.scan(layer, params, jax.numpy.ones((7, 2, 3)), mask=mask)
    >>> ys.shape, carry.h.shape, bool((ys[4:, 1] == 0).all())
    ((7, 2, 5), (2, 5), True)
    """
    check_layer("layer", layer)
    check_implementation(implementation)
    check_type("reverse", reverse, bool)
    check_type("remat", remat, bool)
    xs = as_array("xs", xs)
    if xs.ndim < 2:
        raise ValueError(
            f"xs should have at least 2 dimensions (T, *batch, features), got shape {xs.shape}"
        )
    params = check_input("xs", layer, params, xs)
    if mask is not None:
        mask = as_array("mask", mask)
        _check_mask(mask, xs)
    if carry is not None:
        carry = check_carry(layer, carry, xs.shape[1:-1], xs.dtype)
    return _scan(
        layer, params, xs, carry, mask, key,
        reverse=reverse, unroll=unroll, implementation=implementation, remat=remat,
    )  # fmt: skip


# Compiled here, too, so that a call outside jit, or its gradient, compiles once. Not inlined into
# what calls it: the gradient of an inlined loop would compile anew every time.
# Arguments that nothing is computed from, where there are no steps, still say on which devices.
@functools.partial(
    jax.jit,
    static_argnums=0,
    static_argnames=("reverse", "unroll", "implementation", "remat"),
    keep_unused=True,
)
def _scan(
    layer: Layer,
    params: Params,
    xs: jax.Array,
    carry: Carry | None,
    mask: jax.Array | None,
    key: jax.Array | None,
    **options: Any,
) -> tuple[Carry, jax.Array]:
    def run(carry: Carry) -> tuple[Carry, jax.Array]:
        return run_layer(layer, params, carry, xs, mask=mask, key=key, **options)

    if carry is None:
        return run(initial_carry(layer, xs.shape[1:-1], xs.dtype))
    if mask is None:
        return run(carry)

    # NaN in the state of a row that is all padding would reach the weights' gradients, as 0 * NaN.
    rows = mask.any(axis=0)

    def has_rows(leaf: jax.Array) -> bool:
        return leaf.shape[: rows.ndim] == rows.shape and jnp.issubdtype(leaf.dtype, jnp.inexact)

    def start_of(leaf: jax.Array) -> jax.Array:
        if not has_rows(leaf):
            return leaf
        return jnp.where(jnp.isfinite(leaf), leaf, where_valid(rows, leaf, jnp.zeros_like(leaf)))

    def end_of(end: jax.Array, given: jax.Array) -> jax.Array:
        return where_valid(rows, end, shard_like(given, end)) if has_rows(end) else end

    end, ys = run(jax.tree.map(start_of, carry))
    return jax.tree.map(end_of, end, carry), ys


def _check_mask(mask: jax.Array, xs: jax.Array) -> None:
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask should be of dtype bool, got: {mask.dtype}")
    if mask.shape != xs.shape[:-1]:
        raise ValueError(
            f"mask should have the shape of xs without features, {xs.shape[:-1]}, got: {mask.shape}"
        )
