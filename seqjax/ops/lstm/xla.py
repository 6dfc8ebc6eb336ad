"""The LSTM's elementwise part, arranged as XLA vectorises it."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from seqjax.ops.kernel import Factors, Kernel, Saved, State, barrier


@dataclasses.dataclass(frozen=True)
class LSTMKernel(Kernel):
    """`c' = f * c + i * g`, `m = o * tanh(c')`; saves the tanh that all four gates are made of."""

    separate: ClassVar[bool] = False

    def step(
        self, from_x: jax.Array, from_h: jax.Array, state: State, valid: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, Saved]:
        # sigmoid(x) = (1 + tanh(x / 2)) / 2: one tanh of one contiguous array serves all gates.
        # The barriers keep the transcendentals apart from the slices: fused, XLA computes them
        # element by element.
        scale = np.repeat(np.array([0.5, 0.5, 1, 0.5], from_x.dtype), from_x.shape[-1] // 4)
        tanhs = barrier(jnp.tanh((from_x + from_h) * scale))
        saved = tuple(jnp.split(tanhs, 4, axis=-1))
        i, f, g, o = _gates(saved)
        keep, add = f, i * g
        if valid is not None:
            # A select of c itself would make XLA compute c again for m.
            keep, add = jnp.where(valid, f, 1), jnp.where(valid, add, 0)
        c = barrier(keep * state.c + add)
        return o * jnp.tanh(c), c, saved

    def factors(self, saved: Saved, before: State, h: jax.Array) -> Factors:
        i, f, g, o = _gates(saved)
        tanh_c = jnp.tanh(f * before.c + i * g)
        return (
            g * i * (1 - i),
            before.c * f * (1 - f),
            i * (1 - g * g),
            tanh_c * o * (1 - o),
            f,
            o * (1 - tanh_c * tanh_c),
        )

    def tangent(
        self, factors: Factors, d_from_x: Any, d_from_h: Any, d: State
    ) -> tuple[jax.Array, jax.Array]:
        by_i, by_f, by_g, by_o, f, from_c = factors
        d_i, d_f, d_g, d_o = jnp.split(d_from_h, 4, axis=-1)
        d_c = f * d.c + by_i * d_i + by_f * d_f + by_g * d_g
        return by_o * d_o + from_c * d_c, d_c

    def hidden(self, saved: Saved, before: State) -> jax.Array:
        i, f, g, o = _gates(saved)
        return o * jnp.tanh(f * before.c + i * g)


def _gates(tanhs: Saved) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    i, f, g, o = tanhs
    return 0.5 + 0.5 * i, 0.5 + 0.5 * f, g, 0.5 + 0.5 * o
