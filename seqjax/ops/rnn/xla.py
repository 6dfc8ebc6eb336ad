"""The Elman recurrence's elementwise part."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from seqjax.ops.kernel import Factors, Kernel, State


@dataclasses.dataclass(frozen=True)
class RNNKernel(Kernel):
    """`m = tanh(from_x + from_h)`, or relu; saves m only where the state rounds it to 16 bits."""

    nonlinearity: str

    separate: ClassVar[bool] = False

    def step(
        self, from_x: jax.Array, from_h: jax.Array, state: State, valid: jax.Array | None
    ) -> tuple[jax.Array, None, jax.Array | None]:
        function = jnp.tanh if self.nonlinearity == "tanh" else jax.nn.relu
        m = function(from_x + from_h)
        return m, None, None if m.dtype == state.h.dtype else m

    def factors(self, saved: Any, before: State, h: jax.Array) -> Factors:
        m = h if saved is None else saved
        if self.nonlinearity == "tanh":
            return (1 - m * m,)
        return ((m > 0).astype(m.dtype),)

    def tangent(
        self, factors: Factors, d_from_x: Any, d_from_h: Any, d: State
    ) -> tuple[jax.Array, None]:
        return factors[0] * d_from_h, None
