"""Flax's linen modules: `RNN` over a cell, `Bidirectional` stacked by hand."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

from benchmarks.cases import Case
from benchmarks.peers.jax_program import JaxPeer, Network, Stepper

CELLS = {"LSTM": linen.OptimizedLSTMCell, "GRU": linen.GRUCell, "RNN": linen.SimpleCell}


class Peer(JaxPeer):
    """flax.linen."""

    distribution = "flax"

    def network(self, case: Case) -> Network:
        def rnn() -> linen.RNN:
            # Time-major, so that no transposition is charged.
            return linen.RNN(self._cell(case), time_major=True, return_carry=True)

        def layer() -> linen.Module:
            if not case.bidirectional:
                return rnn()
            return linen.Bidirectional(rnn(), rnn(), time_major=True, return_carry=True)

        layers = [layer() for _ in range(case.num_layers)]

        def apply(params: Any, xs: jax.Array, lengths: jax.Array | None) -> tuple[Any, jax.Array]:
            states = []
            for layer, layer_params in zip(layers, params, strict=True):
                carry, xs = layer.apply({"params": layer_params}, xs, seq_lengths=lengths)
                states += carry if case.bidirectional else [carry]
            if case.cell == "LSTM":
                states = [(h, c) for c, h in states]
            return states, xs

        return Network(lambda weights: [_layer_params(case, cells) for cells in weights], apply)

    def stepper(self, case: Case) -> Stepper:
        cell = self._cell(case)

        def step(params: Any, carry: Any, x: jax.Array) -> tuple[Any, jax.Array]:
            return cell.apply({"params": params}, carry, x)

        carry = cell.initialize_carry(jax.random.key(0), (case.batch, case.input_size))
        return Stepper(lambda weights: _params(case, weights), step, carry)

    def _cell(self, case: Case) -> linen.RNNCellBase:
        dtype = self.settings.dtype
        return CELLS[case.cell](case.hidden_size, dtype=dtype, param_dtype=dtype)


def _layer_params(case: Case, cells: Any) -> dict[str, Any]:
    if not case.bidirectional:
        return {"cell": _params(case, cells[0])}
    names = ("forward_rnn", "backward_rnn")
    return {name: {"cell": _params(case, cell)} for name, cell in zip(names, cells, strict=True)}


def _params(case: Case, weights: Any) -> dict[str, Any]:
    """The LSTM has its bias with h, the others with x; the GRU a second n bias with h."""
    w_ih, w_hh, bias = (jnp.split(array, case.gates, axis=-1) for array in weights)
    if case.cell == "RNN":
        return {"i": {"kernel": w_ih[0], "bias": bias[0]}, "h": {"kernel": w_hh[0]}}
    params = {}
    for index, name in enumerate({"LSTM": "ifgo", "GRU": "rzn"}[case.cell]):
        params["i" + name] = {"kernel": w_ih[index]}
        params["h" + name] = {"kernel": w_hh[index]}
        params[("h" if case.cell == "LSTM" else "i") + name]["bias"] = bias[index]
    if case.cell == "GRU":
        params["hn"]["bias"] = jnp.zeros_like(bias[2])
    return params
