"""seqjax: its functional core, with each implementation, and used in other ways."""

from typing import Any

import jax
import jax.numpy as jnp

import seqjax
from benchmarks.cases import Case
from benchmarks.data import Data
from benchmarks.peers.jax_program import JaxPeer, JaxProgram, Network, Stepper
from benchmarks.peers.program import Settings
from seqjax.ops.dispatch import IMPLEMENTATIONS

CELLS = {"LSTM": seqjax.LSTMCell, "GRU": seqjax.GRUCell, "RNN": seqjax.RNNCell}


class Peer(JaxPeer):
    """seqjax.

    Args:
      settings: of the run.
      variant: as for `JaxPeer`; "full-lengths" gives every row its full length as a mask; "vmap"
        maps single sequences over the batch; anything else is an implementation, as in
        `seqjax.scan`, or None.
    """

    distribution = "seqjax"

    def __init__(self, settings: Settings, variant: str | None = None) -> None:
        super().__init__(settings, variant)
        self.vmapped = variant == "vmap"
        self.full_lengths = variant == "full-lengths"
        self.implementation = variant if variant in IMPLEMENTATIONS else None

    def program(self, case: Case, data: Data) -> JaxProgram:
        if self.full_lengths:
            data = data._replace(lengths=data.mask.sum(0)[:, 0].astype("int32"))
        return super().program(case, data)

    def network(self, case: Case) -> Network:
        layer = _layer(case)

        def apply(params: Any, xs: jax.Array, lengths: jax.Array | None) -> tuple[Any, jax.Array]:
            mask = None if lengths is None else seqjax.lengths_to_mask(lengths, case.time)
            return seqjax.scan(layer, params, xs, mask=mask, implementation=self.implementation)

        def apply_rows(params: Any, xs: jax.Array, lengths: None) -> tuple[Any, jax.Array]:
            return jax.vmap(lambda row: seqjax.scan(layer, params, row), 1, (0, 1))(xs)

        return Network(
            lambda weights: _layer_params(case, weights), apply_rows if self.vmapped else apply
        )

    def stepper(self, case: Case) -> Stepper:
        cell = _cell(case, case.input_size)
        carry = cell.initial_carry((case.batch,), self.settings.dtype)
        return Stepper(lambda weights: _params(case, weights), cell.step, carry)


def _cell(case: Case, input_size: int) -> seqjax.Cell:
    return CELLS[case.cell](input_size, case.hidden_size)


def _layer(case: Case) -> seqjax.Layer:
    """A bare cell where that is all there is."""
    cells = [_cell(case, size) for size in case.input_sizes]
    layers = [seqjax.Bidirectional(cell, cell) if case.bidirectional else cell for cell in cells]
    return seqjax.Stack(layers) if len(layers) > 1 else layers[0]


def _layer_params(case: Case, weights: Any) -> Any:
    layers = []
    for directions in weights:
        cells = [_params(case, cell) for cell in directions]
        layers.append(seqjax.BidirectionalParams(*cells) if case.bidirectional else cells[0])
    return tuple(layers) if len(layers) > 1 else layers[0]


def _params(case: Case, weights: Any) -> Any:
    arrays = {"w_ih": weights.w_ih, "w_hh": weights.w_hh, "b_ih": weights.bias}
    arrays["b_hh"] = jnp.zeros_like(weights.bias)
    match case.cell:
        case "LSTM":
            return seqjax.LSTMParams(**arrays, w_hr=None)
        case "GRU":
            return seqjax.GRUParams(**arrays)
        case _:
            return seqjax.RNNParams(**arrays)
