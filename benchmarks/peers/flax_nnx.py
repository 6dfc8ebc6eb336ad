"""Flax's nnx modules: `RNN` over a cell, `Bidirectional` stacked by hand.

They run as pure functions, `nnx.split` once and `nnx.merge` inside `jax.jit`, which spares flax
what `nnx.jit` spends on going through the module at every call.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.cases import Case
from benchmarks.peers.jax_program import JaxPeer, Network, Stepper

CELLS = {"LSTM": nnx.OptimizedLSTMCell, "GRU": nnx.GRUCell, "RNN": nnx.SimpleCell}


class Peer(JaxPeer):
    """flax.nnx."""

    distribution = "flax"

    def network(self, case: Case) -> Network:
        layers = nnx.List([self._layer(case, size) for size in case.input_sizes])
        graph, params, rest = nnx.split(layers, nnx.Param, ...)

        def convert(weights: Any) -> Any:
            layers = nnx.merge(graph, params, rest, copy=True)
            for layer, directions in zip(layers, weights, strict=True):
                rnns = (layer.forward_rnn, layer.backward_rnn) if case.bidirectional else (layer,)
                for rnn, cell_weights in zip(rnns, directions, strict=True):
                    _load(case, rnn.cell, cell_weights)
            return nnx.state(layers, nnx.Param)

        def apply(params: Any, xs: jax.Array, lengths: jax.Array | None) -> tuple[Any, jax.Array]:
            states = []
            for layer in nnx.merge(graph, params, rest, copy=True):
                carry, xs = layer(xs, seq_lengths=lengths)
                states += carry if case.bidirectional else [carry]
            if case.cell == "LSTM":
                states = [(h, c) for c, h in states]
            return states, xs

        return Network(convert, apply)

    def stepper(self, case: Case) -> Stepper:
        graph, params, rest = nnx.split(self._cell(case, case.input_size), nnx.Param, ...)

        def convert(weights: Any) -> Any:
            cell = nnx.merge(graph, params, rest, copy=True)
            _load(case, cell, weights)
            return nnx.state(cell, nnx.Param)

        def step(params: Any, carry: Any, x: jax.Array) -> tuple[Any, jax.Array]:
            return nnx.merge(graph, params, rest, copy=True)(carry, x)

        zeros = jnp.zeros((case.batch, case.hidden_size), self.settings.dtype)
        return Stepper(convert, step, (zeros, zeros) if case.cell == "LSTM" else zeros)

    def _layer(self, case: Case, input_size: int) -> nnx.Module:
        # Time-major, so that no transposition is charged.
        options = {"time_major": True, "return_carry": True}
        rnns = [
            nnx.RNN(self._cell(case, input_size), **options) for _ in range(case.num_directions)
        ]
        return nnx.Bidirectional(*rnns, **options) if case.bidirectional else rnns[0]

    def _cell(self, case: Case, input_size: int) -> nnx.Module:
        dtype = jnp.dtype(self.settings.dtype)
        zeros = nnx.initializers.zeros  # Quicker than drawing orthogonal ones: `_load` follows.
        return CELLS[case.cell](
            input_size,
            case.hidden_size,
            dtype=dtype,
            param_dtype=dtype,
            kernel_init=zeros,
            recurrent_kernel_init=zeros,
            rngs=nnx.Rngs(0),
        )


def _load(case: Case, cell: Any, weights: Any) -> None:
    """The LSTM has its bias with h, the others with x; the GRU has no second n bias."""
    cell.dense_i.kernel[...] = weights.w_ih
    cell.dense_h.kernel[...] = weights.w_hh
    (cell.dense_h if case.cell == "LSTM" else cell.dense_i).bias[...] = weights.bias
