"""Keras on the JAX backend: `LSTM`, `GRU` and `SimpleRNN`, and `Bidirectional`'s two directions."""

from typing import Any

import jax
import jax.numpy as jnp
import keras

from benchmarks.cases import Case
from benchmarks.peers.jax_program import JaxPeer, Network
from benchmarks.peers.program import Settings

LAYERS = {"LSTM": keras.layers.LSTM, "GRU": keras.layers.GRU, "RNN": keras.layers.SimpleRNN}


class Peer(JaxPeer):
    """keras."""

    distribution = "keras"

    def __init__(self, settings: Settings) -> None:
        if keras.backend.backend() != "jax":
            raise ImportError(f"keras runs on {keras.backend.backend()}; set KERAS_BACKEND=jax")
        super().__init__(settings)

    def unsupported(self, case: Case) -> str | None:
        if case.mode in ("step", "decode"):
            return "measured on whole sequences only"
        return None

    def network(self, case: Case) -> Network:
        layers = [
            [self._layer(case, size, backwards) for backwards in range(case.num_directions)]
            for size in case.input_sizes
        ]

        def apply(params: Any, xs: jax.Array, lengths: jax.Array | None) -> tuple[Any, jax.Array]:
            mask = None
            if lengths is not None:
                mask = jnp.arange(case.time) < lengths[:, None]
            states = []
            for directions, layer_params in zip(layers, params, strict=True):
                outputs = []
                for layer, weights in zip(directions, layer_params, strict=True):
                    rest = [variable.value for variable in layer.non_trainable_variables]
                    (ys, *state), _ = layer.stateless_call(weights, rest, xs, mask=mask)
                    outputs.append(ys[:, ::-1] if layer.go_backwards else ys)
                    states.append(state)
                xs = jnp.concatenate(outputs, axis=-1)
            return states, xs

        def convert(weights: Any) -> Any:
            return [[_params(case, cell) for cell in directions] for directions in weights]

        return Network(convert, apply, batch_major=True)  # Keras has no other layout.

    def _layer(self, case: Case, input_size: int, backwards: int) -> keras.layers.Layer:
        layer = LAYERS[case.cell](
            case.hidden_size,
            return_sequences=True,
            return_state=True,
            go_backwards=bool(backwards),
            # The weights follow; Keras cannot draw orthogonal ones in 16 bits.
            recurrent_initializer="zeros",
            dtype=self.settings.dtype,
        )
        layer.build((case.batch, case.time, input_size))
        return layer


def _params(case: Case, weights: Any) -> list[jax.Array]:
    """The GRU's gates are z r n, and it has both biases."""
    if case.cell != "GRU":
        return list(weights)

    def z_first(array: jax.Array) -> jax.Array:
        r, z, n = jnp.split(array, 3, axis=-1)
        return jnp.concatenate([z, r, n], axis=-1)

    w_ih, w_hh, bias = (z_first(array) for array in weights)
    return [w_ih, w_hh, jnp.stack([bias, jnp.zeros_like(bias)])]
