"""dm-haiku: its cores under `dynamic_unroll`."""

from typing import Any

import haiku
import jax
import jax.numpy as jnp

from benchmarks.cases import Case
from benchmarks.peers.jax_program import JaxPeer, Network

CORES = {"LSTM": haiku.LSTM, "GRU": haiku.GRU, "RNN": haiku.VanillaRNN}


class Peer(JaxPeer):
    """haiku."""

    distribution = "dm-haiku"

    def unsupported(self, case: Case) -> str | None:
        if case.mode in ("step", "decode"):
            return "measured on whole sequences only"
        if case.ragged:
            return "its unroll functions know no lengths"
        if case.bidirectional:
            return "it has no bidirectional layer"
        return None

    def other_equation(self, case: Case) -> bool:
        """The GRU's reset gate acts before the product, and VanillaRNN has relu for tanh."""
        return case.cell != "LSTM"

    def network(self, case: Case) -> Network:
        @haiku.without_apply_rng
        @haiku.transform
        def unroll(xs: jax.Array) -> Any:
            core = CORES[case.cell](case.hidden_size, name="core")
            state = jax.tree.map(lambda a: a.astype(xs.dtype), core.initial_state(case.batch))
            return haiku.dynamic_unroll(core, xs, state, time_major=True)

        def apply(params: Any, xs: jax.Array, lengths: None) -> tuple[Any, jax.Array]:
            ys, state = unroll.apply(params, xs)
            return [state], ys  # An LSTMState has h before c.

        return Network(lambda weights: _params(case, weights[0][0]), apply)


def _params(case: Case, weights: Any) -> dict[str, Any]:
    w_ih, w_hh, bias = weights
    if case.cell == "RNN":
        return {
            "core/linear": {"w": w_ih, "b": bias},
            "core/linear_1": {"w": w_hh, "b": jnp.zeros_like(bias)},
        }
    if case.cell == "GRU":  # Another equation: any weights do.
        return {"core": {"w_i": w_ih, "w_h": w_hh, "b": bias}}

    def g_second(array: jax.Array) -> jax.Array:
        i, f, g, o = jnp.split(array, 4, axis=-1)
        return jnp.concatenate([i, g, f, o], axis=-1)

    # It adds 1 to the forget gate.
    is_forget = jnp.arange(4 * case.hidden_size) // case.hidden_size == 2
    w = jnp.concatenate([g_second(w_ih), g_second(w_hh)])
    return {"core/linear": {"w": w, "b": g_second(bias) - is_forget.astype(bias.dtype)}}
