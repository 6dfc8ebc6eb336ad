"""The layers that every common test runs over, with random weights and inputs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import seqjax

INPUT_SIZE = 3
HIDDEN_SIZE = 5

CELLS: dict[str, seqjax.Cell] = {
    "rnn_tanh": seqjax.RNNCell(INPUT_SIZE, HIDDEN_SIZE),
    "rnn_relu": seqjax.RNNCell(INPUT_SIZE, HIDDEN_SIZE, nonlinearity="relu"),
    "rnn_no_bias": seqjax.RNNCell(INPUT_SIZE, HIDDEN_SIZE, bias=False),
    "lstm": seqjax.LSTMCell(INPUT_SIZE, HIDDEN_SIZE),
    "lstm_no_bias": seqjax.LSTMCell(INPUT_SIZE, HIDDEN_SIZE, bias=False),
    "lstm_proj": seqjax.LSTMCell(INPUT_SIZE, HIDDEN_SIZE, proj_size=2),
    "gru": seqjax.GRUCell(INPUT_SIZE, HIDDEN_SIZE),
    "gru_no_bias": seqjax.GRUCell(INPUT_SIZE, HIDDEN_SIZE, bias=False),
}

STEPPING: dict[str, seqjax.Layer] = CELLS | {
    "stack": seqjax.Stack(
        [
            seqjax.LSTMCell(INPUT_SIZE, HIDDEN_SIZE, proj_size=4),
            seqjax.GRUCell(4, 6),
            seqjax.RNNCell(6, HIDDEN_SIZE),
        ],
        dropout=0.3,
    ),
}
"""Layers that can run online."""

LAYERS: dict[str, seqjax.Layer] = STEPPING | {
    "bidirectional": seqjax.Bidirectional(
        seqjax.LSTMCell(INPUT_SIZE, HIDDEN_SIZE), seqjax.GRUCell(INPUT_SIZE, 4)
    ),
    "stack_bidirectional": seqjax.Stack(
        [
            seqjax.Bidirectional(
                seqjax.LSTMCell(INPUT_SIZE, HIDDEN_SIZE, proj_size=2),
                seqjax.LSTMCell(INPUT_SIZE, HIDDEN_SIZE, proj_size=2),
            ),
            seqjax.Bidirectional(seqjax.GRUCell(4, 4), seqjax.GRUCell(4, 4)),
        ]
    ),
}


def random_like(tree: Any, seed: int, scale: float = 0.5) -> Any:
    """Normal random numbers in the shapes and dtypes of `tree`: nothing zero, nothing equal."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype), tree
    )


def random_params(layer: seqjax.Layer, seed: int = 0, dtype: Any = jnp.float32) -> Any:
    """Random parameters, biases included."""
    return random_like(jax.eval_shape(lambda key: layer.init(key, dtype), jax.random.key(0)), seed)


def random_carry(
    layer: seqjax.Layer, batch_shape: tuple[int, ...], seed: int = 1, dtype: Any = jnp.float32
) -> Any:
    """A random state, as if the sequence went on."""
    return random_like(jax.eval_shape(lambda: layer.initial_carry(batch_shape, dtype)), seed)


def random_inputs(shape: tuple[int, ...], seed: int = 2, dtype: Any = jnp.float32) -> jax.Array:
    """Random inputs."""
    return random_like(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), seed, scale=1.0)
