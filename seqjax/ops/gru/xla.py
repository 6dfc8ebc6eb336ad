"""The GRU's elementwise part, arranged as XLA vectorises it."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from seqjax.ops.kernel import Kernel, Saved, State, barrier
from seqjax.ops.precision import widen


@dataclasses.dataclass(frozen=True)
class GRUKernel(Kernel):
    """`n = tanh(x_n + r * h_n)`, `m = n + z * (h - n)`; saves what the two are made of, and n."""

    separate: ClassVar[bool] = True

    def step(
        self, from_x: jax.Array, from_h: jax.Array, state: State
    ) -> tuple[jax.Array, None, Saved]:
        x_rz, x_n = _split(from_x)
        h_rz, h_n = _split(from_h)
        # As in the LSTM, sigmoids are made of tanh. All of the step would become one slow fusion,
        # barriers or not, but for the concatenation, which XLA writes out.
        tanh_rz = jnp.tanh(0.5 * (x_rz + h_rz))
        tanhs = barrier(jnp.concatenate([tanh_rz, h_n], axis=-1))
        rz, h_n = _gates(tanhs)
        r, z = jnp.split(rz, 2, axis=-1)
        n = jnp.tanh(x_n + r * h_n)
        h = widen(state.h)
        return n + z * (h - n), None, (tanhs, n)

    def tangent(
        self, saved: Saved, before: State, after: State, d_from_x: Any, d_from_h: Any, d: State
    ) -> tuple[jax.Array, None]:
        tanhs, n = saved
        rz, h_n = _gates(tanhs)
        r, z = jnp.split(rz, 2, axis=-1)
        d_x_rz, d_x_n = _split(d_from_x)
        d_h_rz, d_h_n = _split(barrier(d_from_h))
        d_rz = rz * (1 - rz) * (d_x_rz + d_h_rz)
        d_r, d_z = jnp.split(d_rz, 2, axis=-1)
        d_n = (1 - n * n) * (d_x_n + h_n * d_r + r * d_h_n)
        return (1 - z) * d_n + z * d.h + (before.h - n) * d_z, None


def _gates(tanhs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """r and z side by side, and h_n."""
    tanh_rz, h_n = _split(tanhs)
    return 0.5 + 0.5 * tanh_rz, h_n


def _split(gates: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Transposed, a split is a concatenation, where two slices would be padded and added.
    rz, n = jnp.split(gates, [2 * (gates.shape[-1] // 3)], axis=-1)
    return rz, n
