"""Equinox: its cells, which take one row, under `jax.vmap` and `lax.scan`, as its manual has it."""

from typing import Any

import equinox
import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.cases import Case
from benchmarks.peers.jax_program import JaxPeer, Network, Stepper

CELLS = {"LSTM": equinox.nn.LSTMCell, "GRU": equinox.nn.GRUCell}


class Peer(JaxPeer):
    """equinox."""

    distribution = "equinox"

    def unsupported(self, case: Case) -> str | None:
        if case.cell not in CELLS:
            return "it has no plain RNN cell"
        if case.ragged:
            return "it has no lengths"
        if case.bidirectional:
            return "it has no bidirectional layer"
        return None

    def network(self, case: Case) -> Network:
        convert_cell, step, carry = self.stepper(case)

        def apply(params: Any, xs: jax.Array, lengths: None) -> tuple[Any, jax.Array]:
            state, ys = lax.scan(lambda carry, x: step(params, carry, x), carry, xs)
            return [state], ys  # The LSTM's has h before c.

        return Network(lambda weights: convert_cell(weights[0][0]), apply)

    def stepper(self, case: Case) -> Stepper:
        dtype = jnp.dtype(self.settings.dtype)
        cell = CELLS[case.cell](
            case.input_size, case.hidden_size, dtype=dtype, key=jax.random.key(0)
        )

        def convert(weights: Any) -> Any:
            arrays = [weights.w_ih.T, weights.w_hh.T, weights.bias]
            if case.cell == "GRU":
                arrays.append(jnp.zeros(case.hidden_size, dtype))
            return arrays

        def step(params: Any, carry: Any, x: jax.Array) -> tuple[Any, jax.Array]:
            loaded = equinox.tree_at(jax.tree.leaves, cell, params)
            carry = jax.vmap(loaded)(x, carry)
            return carry, carry[0] if case.cell == "LSTM" else carry

        zeros = jnp.zeros((case.batch, case.hidden_size), dtype)
        return Stepper(convert, step, (zeros, zeros) if case.cell == "LSTM" else zeros)
