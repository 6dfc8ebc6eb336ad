"""What a cell tells the whole-sequence implementation: its elementwise part, and its derivative."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax

barrier: Callable[..., Any] = jax.lax.optimization_barrier
"""XLA fuses nothing across it, and merges nothing behind it with what stands before."""

Saved = Any
"""A pytree of arrays `(rows, features)`: what `Kernel.factors` needs of a step."""

Factors = tuple[jax.Array, ...]
"""Arrays `(*steps, rows, hidden_size)`: the derivative's, of one step or of many."""


class State(NamedTuple):
    """The state between two steps."""

    h: jax.Array  # (rows, features), in the input's dtype: what the recurrent weights multiply
    c: Any  # (rows, hidden_size), in the accumulation dtype; None but for the LSTM


class Kernel(abc.ABC):
    """A cell without its matrix products, hashable.

    A step multiplies, `from_x = x @ w_ih + b_ih` and `from_h = h @ w_hh + b_hh`, and hands both to
    `step`. All arrays are in the accumulation dtype, except for the state's `h`.
    """

    separate: ClassVar[bool]
    """Whether `from_x` and `from_h` do more than add up, so that each needs its own gradient."""

    @abc.abstractmethod
    def step(
        self, from_x: jax.Array, from_h: jax.Array, state: State, valid: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None, Saved]:
        """The new hidden units `m` (rows, hidden_size), the new `c`, and what `factors` needs.

        Where `valid`, bool (rows, 1), is off, `c` stays as it was; `m` may be anything.
        """

    def projects_ahead(self, rows: Any, w_ih: jax.Array) -> bool:
        """Whether `x @ w_ih` is faster for a chunk of steps at once, where nothing is saved."""
        return True

    @abc.abstractmethod
    def factors(self, saved: Saved, before: State, h: jax.Array) -> Factors:
        """What `tangent` multiplies tangents by. Elementwise: for many steps at a time.

        Args:
          saved: of the steps.
          before: the states before them.
          h: their new h.

        Each factor is an array of its own: in a loop, XLA vectorises the reading of several arrays
        at one index, but not of several slices of one.
        """

    @abc.abstractmethod
    def tangent(
        self, factors: Factors, d_from_x: Any, d_from_h: Any, d: State
    ) -> tuple[jax.Array, jax.Array | None]:
        """The derivative of a step, d_m and d_c: linear in `d_from_x`, `d_from_h` and `d`.

        Where the two are not `separate`, `d_from_h` holds the derivative of their sum and
        `d_from_x` is None.
        """

    def hidden(self, saved: Saved, before: State) -> jax.Array:
        """The `m` of saved steps."""
        raise NotImplementedError("only the LSTM has a projection, which asks for this")
