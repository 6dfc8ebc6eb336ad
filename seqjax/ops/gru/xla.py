"""The GRU's elementwise part, arranged as XLA vectorises it."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from seqjax.ops.kernel import Factors, Kernel, Saved, State, barrier
from seqjax.ops.precision import widen


@dataclasses.dataclass(frozen=True)
class GRUKernel(Kernel):
    """`n = tanh(x_n + r * h_n)`, `m = n + z * (h - n)`; saves what the two are made of, and n."""

    separate: ClassVar[bool] = True

    def step(
        self, from_x: jax.Array, from_h: jax.Array, state: State, valid: jax.Array | None
    ) -> tuple[jax.Array, None, Saved]:
        x_rz, x_n = _split(from_x)
        h_rz, h_n = _split(from_h)
        # As in the LSTM, sigmoids are made of tanh. All of the step would become one slow fusion,
        # barriers or not, but for the concatenation, which XLA writes out. For one row, the fusion
        # is faster.
        tanh_rz = jnp.tanh(0.5 * (x_rz + h_rz))
        tanhs = jnp.concatenate([tanh_rz, h_n], axis=-1)
        if from_h.shape[0] != 1:
            tanh_rz, h_n = _split(barrier(tanhs))
        r, z = jnp.split(0.5 + 0.5 * tanh_rz, 2, axis=-1)
        n = jnp.tanh(x_n + r * h_n)
        h = widen(state.h)
        return n + z * (h - n), None, (*jnp.split(tanhs, 3, axis=-1), n)

    def projects_ahead(self, rows: Any, w_ih: jax.Array) -> bool:
        # One row's fusion is slow where it reads what was projected ahead at an index of the loop.
        return rows != 1 or w_ih.size > 2**15

    def factors(self, saved: Saved, before: State, h: jax.Array) -> Factors:
        r, z, h_n, n = saved
        r, z = 0.5 + 0.5 * r, 0.5 + 0.5 * z
        from_n = (1 - z) * (1 - n * n)
        return (
            from_n * h_n * r * (1 - r),
            (before.h - n) * z * (1 - z),
            from_n,
            from_n * r,
            z,
        )

    def tangent(
        self, factors: Factors, d_from_x: Any, d_from_h: Any, d: State
    ) -> tuple[jax.Array, None]:
        by_r, by_z, by_x_n, by_h_n, z = factors
        d_x_r, d_x_z, d_x_n = jnp.split(d_from_x, 3, axis=-1)
        d_h_r, d_h_z, d_h_n = jnp.split(d_from_h, 3, axis=-1)
        d_gates = by_r * (d_x_r + d_h_r) + by_z * (d_x_z + d_h_z)
        return d_gates + by_x_n * d_x_n + by_h_n * d_h_n + z * d.h, None


def _split(gates: jax.Array) -> tuple[jax.Array, jax.Array]:
    """r and z side by side, and n."""
    # Transposed, a split is a concatenation, where two slices would be padded and added.
    rz, n = jnp.split(gates, [2 * (gates.shape[-1] // 3)], axis=-1)
    return rz, n
