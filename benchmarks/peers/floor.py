"""No library: what a case cannot do without, by XLA, and nothing else.

That is the matrix products and the tanhs, and in training that the tanhs are kept for the backward
pass. Nothing that multiplies in JAX is faster, so this is the floor under every peer that does. A
sigmoid counts as a tanh, which it is made of.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.cases import Case
from benchmarks.data import Data
from benchmarks.peers.jax_program import JaxPeer, JaxProgram

barrier = lax.optimization_barrier


class Peer(JaxPeer):
    """Products of the inputs at once, those of the states and the tanhs step by step."""

    distribution = "jax"

    def unsupported(self, case: Case) -> str | None:
        return "measured where all rows have one length" if case.ragged else None

    def other_equation(self, case: Case) -> bool:
        return True

    def program(self, case: Case, data: Data) -> JaxProgram:
        dtype = jnp.dtype(self.settings.dtype)
        data = jax.tree.map(lambda a: a.astype(dtype) if a.dtype == float else a, data)
        if case.mode == "decode":
            hidden = jnp.zeros((case.batch, case.hidden_size), dtype)
            return JaxProgram(_decode(case), (data.weights[0][0], data, hidden), list)
        function = functools.partial(_train if case.mode == "train" else _forward, case)
        return JaxProgram(function, ([_operands(case, *cell) for cell in _cells(data)],), list)


def _cells(data: Data) -> Any:
    """Weights of every cell, each with an input of its size."""
    for directions in data.weights:
        for weights in directions:
            size = weights.w_ih.shape[0]
            yield weights, jnp.resize(data.xs, (*data.xs.shape[:2], size))


def _operands(case: Case, weights: Any, xs: jax.Array) -> dict[str, Any]:
    shape = (case.time, case.batch)
    key = jax.random.key(0)
    return {
        "weights": weights,
        "xs": xs,
        "hs": jax.random.normal(key, (*shape, case.hidden_size), xs.dtype),
        "gates": jax.random.normal(key, (*shape, weights.w_ih.shape[1]), xs.dtype),
    }


def _forward(case: Case, cells: list[dict[str, Any]]) -> list[jax.Array]:
    results = []
    for cell in cells:
        results.append(_product_of_inputs(cell))
        tanhs = functools.partial(_tanhs, case)
        results += _each_step(cell["hs"], cell["weights"].w_hh, tanhs)
    return results


def _product_of_inputs(cell: dict[str, Any]) -> jax.Array:
    flat = cell["xs"].reshape(-1, cell["xs"].shape[-1])
    return barrier(flat @ cell["weights"].w_ih)[-1]


def _tanhs(case: Case, gates: jax.Array) -> tuple[jax.Array, ...]:
    """One of each gate, and of the LSTM's c."""
    gates = barrier(jnp.tanh(gates))
    if case.cell != "LSTM":
        return (gates,)
    return gates, barrier(jnp.tanh(gates[:, : case.hidden_size]))


def _train(case: Case, cells: list[dict[str, Any]]) -> list[jax.Array]:
    return [result for cell in cells for result in _train_cell(case, cell)]


def _train_cell(case: Case, cell: dict[str, Any]) -> list[jax.Array]:
    w_ih, w_hh, *_ = cell["weights"]
    kept = lax.map(lambda h: _tanhs(case, barrier(h @ w_hh)), cell["hs"])
    results = [_product_of_inputs(cell), *[tanhs[-1] for tanhs in kept]]
    results.append(_each_step(kept[0], barrier(w_hh.T)))
    gates = cell["gates"].reshape(-1, cell["gates"].shape[-1])
    for operand in ("xs", "hs"):
        flat = cell[operand].reshape(len(gates), -1)
        results.append(barrier(flat.T) @ gates)
    if cell["xs"].shape[-1] != case.input_size:  # A layer below needs its inputs' gradient.
        results.append(barrier(gates @ w_ih.T)[-1])
    return results


def _each_step(
    values: jax.Array, weight: jax.Array, then: Callable[[jax.Array], Any] = barrier
) -> Any:
    """Multiplies one step after the other, and returns what `then` makes of the last product."""

    def step(index: jax.Array, _: Any) -> Any:
        return then(barrier(values[index] @ weight))

    shapes = jax.eval_shape(step, jnp.int32(0), None)
    first = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    return lax.fori_loop(0, len(values), step, first)


def _decode(case: Case) -> Any:
    def decode(weights: Any, data: Data, hidden: jax.Array) -> tuple[jax.Array, ...]:
        def step(index: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            hidden, *_ = state
            from_x = barrier(data.embedding[index % len(data.embedding)][None] @ weights.w_ih)
            *_, hidden_units = _tanhs(case, barrier(hidden @ weights.w_hh))
            logits = barrier(hidden @ data.head)
            return hidden_units[:, : hidden.shape[1]], from_x, logits

        start = (hidden, jnp.zeros((1, weights.w_ih.shape[1]), hidden.dtype))
        start = (*start, jnp.zeros((1, data.head.shape[1]), hidden.dtype))
        return lax.fori_loop(0, case.time, step, start)

    return decode
