"""What type checkers know of a user's code. `mypy` reads this file; nothing runs it.

`assert_type` says what a checker infers, and `type: ignore` that it objects: mypy reports one that
is not needed.
"""

import dataclasses
from typing import Any, assert_type

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

import seqjax


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
