"""What type checkers know of a user's code. `mypy` reads this file; nothing runs it.

`assert_type` says what a checker infers, and `type: ignore` that it objects: mypy reports one that
is not needed.
"""

import dataclasses
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax.typing import DTypeLike

import seqjax
import seqjax.linen
import seqjax.nnx


@dataclasses.dataclass(frozen=True)
class Decay(seqjax.Cell):
    """A cell of which no types are said."""

    input_size: int

    @property
    def output_size(self) -> int:
        return self.input_size

    def init(self, key: jax.Array, dtype: DTypeLike = jnp.float32) -> dict[str, jax.Array]:
        return {"rate": jax.random.uniform(key, (self.input_size,), dtype)}

    def initial_carry(
        self, batch_shape: tuple[int, ...] = (), dtype: DTypeLike = jnp.float32
    ) -> jax.Array:
        return jnp.zeros((*batch_shape, self.input_size), dtype)

    def step(
        self, params: dict[str, jax.Array], carry: jax.Array, x: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        carry = params["rate"] * carry + x
        return carry, carry


def core(key: jax.Array, xs: jax.Array) -> None:
    lstm, gru = seqjax.LSTMCell(3, 5), seqjax.GRUCell(3, 5)
    carry, ys = seqjax.scan(lstm, lstm.init(key), xs)
    assert_type(carry, seqjax.LSTMCarry)
    assert_type(carry.c, jax.Array)
    assert_type(ys, jax.Array)
    assert_type(lstm.step(lstm.init(key), carry, xs[0]), tuple[seqjax.LSTMCarry, jax.Array])
    assert_type(seqjax.scan(gru, gru.init(key), xs)[0], jax.Array)
    both = seqjax.Bidirectional(lstm, gru)
    assert_type(seqjax.scan(both, both.init(key), xs)[0], seqjax.BidirectionalCarry)
    stack = seqjax.Stack([gru, seqjax.RNNCell(5, 5)])
    assert_type(seqjax.scan(stack, stack.init(key), xs)[0], tuple[Any, ...])

    _ = carry.z  # type: ignore[attr-defined]
    seqjax.scan(lstm, lstm.init(key), xs, ys)  # type: ignore[misc]
    seqjax.scan(lstm, gru.init(key), xs)  # type: ignore[misc]
    lstm.step(lstm.init(key), ys, xs[0])  # type: ignore[arg-type]


def without_types(layer: seqjax.Layer, params: Any, key: jax.Array, xs: jax.Array) -> None:
    assert_type(seqjax.scan(layer, params, xs)[0], Any)
    assert_type(seqjax.scan(Decay(3), Decay(3).init(key), xs)[0], Any)


def with_types(
    cell: seqjax.Cell[dict[str, jax.Array], jax.Array], key: jax.Array, xs: jax.Array
) -> None:
    assert_type(seqjax.scan(cell, cell.init(key), xs)[0], jax.Array)


def nnx_modules(rngs: nnx.Rngs, x: jax.Array) -> None:
    lstm = seqjax.nnx.LSTM(3, 5, 2, True, False, 0.0, False, 2, remat=True, rngs=rngs)
    output, (h_n, c_n) = lstm(x, lengths=np.array([7, 2]))
    assert_type(output, jax.Array)
    assert_type(h_n, jax.Array)
    lstm(np.asarray(x), (h_n, np.asarray(c_n)))
    assert_type(seqjax.nnx.GRU(3, 5, rngs=rngs)(x, h_n), tuple[jax.Array, jax.Array])
    assert_type(seqjax.nnx.RNN(3, 5, 1, "relu", rngs=rngs)(x), tuple[jax.Array, jax.Array])
    assert_type(seqjax.nnx.LSTMCell(3, 5, rngs=rngs)(x), tuple[jax.Array, jax.Array])
    assert_type(seqjax.nnx.GRUCell(3, 5, rngs=rngs)(x, h_n), jax.Array)
    assert_type(seqjax.nnx.RNNCell(3, 5, True, "relu", rngs=rngs)(x, h_n), jax.Array)
    assert_type(lstm.layer, seqjax.Stack)
    assert_type(seqjax.nnx.LSTMCell(3, 5, rngs=rngs).layer, seqjax.LSTMCell)
    assert_type(lstm.initial_state((2,)), tuple[jax.Array, jax.Array])
    assert_type(seqjax.nnx.LSTMCell(3, 5, rngs=rngs).initial_state(), tuple[jax.Array, jax.Array])
    assert_type(seqjax.nnx.GRU(3, 5, rngs=rngs).initial_state((2,)), jax.Array)
    assert_type(seqjax.nnx.RNNCell(3, 5, rngs=rngs).initial_state((2,)), jax.Array)
    lstm.initial_state(2)  # type: ignore[arg-type]
    assert_type(lstm.hidden_size, int)
    assert_type(lstm.rngs, nnx.RngStream | None)
    lstm(x, None, True)
    lstm.dropout = 0.0
    seqjax.nnx.Recurrent(seqjax.GRUCell(3, 5), batch_first=True, rngs=rngs)

    seqjax.nnx.LSTM(
        3,
        5,
        kernel_init=nnx.with_partitioning(jax.nn.initializers.normal(), (None, "model")),
        recurrent_kernel_init=jax.nn.initializers.orthogonal(),
        bias_init=seqjax.initializers.forget_bias(),
        rngs=rngs,
    )

    seqjax.nnx.LSTM("3", 5, rngs=rngs)  # type: ignore[arg-type]
    seqjax.nnx.GRU(3, 5, bias_init="zeros", rngs=rngs)  # type: ignore[arg-type]
    seqjax.nnx.LSTM(3, rngs=rngs)  # type: ignore[call-arg]
    seqjax.nnx.LSTM(3, 5)  # type: ignore[call-arg]
    seqjax.nnx.LSTM(3, 5, rngs=0)  # type: ignore[arg-type]
    seqjax.nnx.LSTM(3, 5, hidden=7, rngs=rngs)  # type: ignore[call-arg]
    seqjax.nnx.GRU(3, 5, proj_size=2, rngs=rngs)  # type: ignore[call-arg]
    seqjax.nnx.GRU(3, 5, 1, True, False, 0.0, False, None, rngs=rngs)  # type: ignore[call-arg]
    seqjax.nnx.RNN(3, 5, 1, True, rngs=rngs)  # type: ignore[arg-type]
    seqjax.nnx.GRUCell(3, 5, True, None, rngs=rngs)  # type: ignore[call-arg]
    seqjax.nnx.Recurrent(3, rngs=rngs)  # type: ignore[arg-type]
    lstm(x, h_n)  # type: ignore[arg-type]
    lstm(x, length=7)  # type: ignore[call-arg]
    lstm.drop_out = 0.0  # type: ignore[attr-defined]
    seqjax.nnx.GRU(3, 5, rngs=rngs)(x, (h_n, c_n))  # type: ignore[arg-type]
    seqjax.nnx.GRUCell(3, 5, rngs=rngs)(x, (h_n, c_n))  # type: ignore[arg-type]


def linen_modules(x: jax.Array) -> None:
    lstm = seqjax.linen.LSTM(3, 5, 2, True, False, 0.0, False, 2, deterministic=True, name="lstm")
    output, (h_n, c_n) = lstm(x, lengths=np.array([7, 2]))
    assert_type(output, jax.Array)
    assert_type(h_n, jax.Array)
    lstm(np.asarray(x), (h_n, np.asarray(c_n)))
    assert_type(seqjax.linen.GRU(3, 5)(x, h_n), tuple[jax.Array, jax.Array])
    assert_type(seqjax.linen.RNN(3, 5, 1, "relu")(x), tuple[jax.Array, jax.Array])
    assert_type(seqjax.linen.LSTMCell(3, 5)(x), tuple[jax.Array, jax.Array])
    assert_type(seqjax.linen.GRUCell(3, 5)(x, h_n), jax.Array)
    assert_type(seqjax.linen.RNNCell(3, 5, True, "relu")(x, h_n), jax.Array)
    assert_type(lstm.layer, seqjax.Stack)
    assert_type(seqjax.linen.LSTMCell(3, 5).layer, seqjax.LSTMCell)
    assert_type(lstm.initial_state((2,)), tuple[jax.Array, jax.Array])
    assert_type(seqjax.linen.LSTMCell(3, 5).initial_state(), tuple[jax.Array, jax.Array])
    assert_type(seqjax.linen.GRU(3, 5).initial_state((2,)), jax.Array)
    assert_type(seqjax.linen.RNNCell(3, 5).initial_state((2,)), jax.Array)
    lstm.initial_state(2)  # type: ignore[arg-type]
    assert_type(lstm.hidden_size, int)
    lstm(x, (h_n, c_n), True)
    seqjax.linen.Recurrent(seqjax.GRUCell(3, 5), batch_first=True, name="gru")

    seqjax.linen.LSTM(
        3,
        5,
        kernel_init=nn.with_partitioning(jax.nn.initializers.normal(), (None, "model")),
        recurrent_kernel_init=jax.nn.initializers.orthogonal(),
        bias_init=seqjax.initializers.forget_bias(),
    )

    seqjax.linen.LSTM("3", 5)  # type: ignore[arg-type]
    seqjax.linen.GRU(3, 5, bias_init="zeros")  # type: ignore[arg-type]
    seqjax.linen.LSTM(3)  # type: ignore[call-arg]
    seqjax.linen.LSTM(3, 5, hidden=7)  # type: ignore[call-arg]
    seqjax.linen.LSTM(3, 5, deterministic=0)  # type: ignore[arg-type]
    seqjax.linen.GRU(3, 5, proj_size=2)  # type: ignore[call-arg]
    seqjax.linen.GRU(3, 5, 1, True, False, 0.0, False, None)  # type: ignore[call-arg]
    seqjax.linen.RNN(3, 5, 1, True)  # type: ignore[arg-type]
    seqjax.linen.GRUCell(3, 5, True, None)  # type: ignore[call-arg]
    seqjax.linen.Recurrent(3)  # type: ignore[arg-type]
    lstm(x, h_n)  # type: ignore[arg-type]
    lstm(x, length=7)  # type: ignore[call-arg]
    seqjax.linen.GRU(3, 5)(x, (h_n, c_n))  # type: ignore[arg-type]
    seqjax.linen.GRUCell(3, 5)(x, (h_n, c_n))  # type: ignore[arg-type]
