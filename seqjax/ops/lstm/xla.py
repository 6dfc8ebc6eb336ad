"""The LSTM's elementwise part, arranged as XLA vectorises it."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.ops.kernel import Kernel, State, barrier


@dataclasses.dataclass(frozen=True)
class LSTMKernel(Kernel):
    """`c' = f * c + i * g`, `m = o * tanh(c')`; saves the tanh that all four gates are made of."""

    separate: ClassVar[bool] = False

    def step(
        self, from_x: jax.Array, from_h: jax.Array, state: State
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        # sigmoid(x) = (1 + tanh(x / 2)) / 2: one tanh of one contiguous array serves all gates.
        # The barriers keep the transcendentals apart from the slices: fused, XLA computes them
        # element by element.
        scale = np.repeat(np.array([0.5, 0.5, 1, 0.5], from_x.dtype), from_x.shape[-1] // 4)
        tanhs = barrier(jnp.tanh((from_x + from_h) * scale))
        i, f, g, o = _gates(tanhs)
        c = barrier(f * state.c + i * g)
        return o * jnp.tanh(c), c, tanhs

    def tangent(
        self, saved: jax.Array, before: State, after: State, d_from_x: Any, d_from_h: Any, d: State
    ) -> tuple[jax.Array, jax.Array]:
        i, f, g, o = _gates(saved)
        tanh_c = barrier(jnp.tanh(after.c))
        d_i, d_f, d_g, d_o = jnp.split(barrier(d_from_h), 4, axis=-1)
        d_c = f * d.c + g * i * (1 - i) * d_i + before.c * f * (1 - f) * d_f + i * (1 - g * g) * d_g
        d_c = barrier(d_c)
        return tanh_c * o * (1 - o) * d_o + o * (1 - tanh_c * tanh_c) * d_c, d_c

    def hidden(self, saved: jax.Array, after: State) -> jax.Array:
        _, _, _, o = _gates(saved)
        return o * jnp.tanh(after.c)


def _gates(tanhs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    i, f, g, o = jnp.split(tanhs, 4, axis=-1)
    return 0.5 + 0.5 * i, 0.5 + 0.5 * f, g, 0.5 + 0.5 * o
