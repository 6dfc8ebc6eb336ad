"""Cells of gates as users write them, none of them in the library, and their equations in NumPy."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import cases
import jax
import jax.numpy as jnp
import numpy as np

import seqjax


class MGUCell(seqjax.GatedCell):
    """Minimal gated unit (Zhou et al., 2016); a gate without activation comes first."""

    gates = {"n": None, "f": jax.nn.sigmoid}

    def combine(self, gates: Any, h: jax.Array) -> jax.Array:
        n_x, n_h = gates.n
        return (1 - gates.f) * h + gates.f * jnp.tanh(n_x + gates.f * n_h)


@dataclasses.dataclass(frozen=True)
class UpdateCell(seqjax.GatedCell):
    """A GRU without reset gate, with a field of its own, and relu for tanh: all sums."""

    leak: float = 0.1

    gates = {"z": jax.nn.sigmoid, "n": jax.nn.relu}

    def combine(self, gates: Any, h: jax.Array) -> jax.Array:
        return (1 - gates.z) * (gates.n - self.leak) + gates.z * h


class CoupledCarry(NamedTuple):
    """State of a `CoupledLSTMCell`: its c, and how much was ever written, besides h."""

    h: jax.Array
    c: jax.Array
    written: jax.Array


class CoupledLSTMCell(seqjax.GatedCell):
    """An LSTM whose forget gate is one minus the input gate, and g any function; three states."""

    gates = {"i": jax.nn.sigmoid, "g": jax.nn.soft_sign, "o": jax.nn.sigmoid}
    carry_type = CoupledCarry

    def combine(self, gates: Any, carry: CoupledCarry) -> CoupledCarry:
        c = (1 - gates.i) * carry.c + gates.i * gates.g
        written = 0.9 * carry.written + gates.i * c
        return CoupledCarry(gates.o * jnp.tanh(c + 0.1 * written), c, written)


class SharpCell(seqjax.GatedCell):
    """One that a gate near zero, or a state of zeros in its place, makes infinite."""

    gates = {"f": jax.nn.sigmoid}
    carry_type = seqjax.LSTMCarry

    def combine(self, gates: Any, carry: seqjax.LSTMCarry) -> seqjax.LSTMCarry:
        return seqjax.LSTMCarry(gates.f, 0.5 * carry.c + jnp.log(gates.f))


CELLS: dict[str, seqjax.GatedCell] = {
    "mgu": MGUCell(cases.INPUT_SIZE, cases.HIDDEN_SIZE),
    "update": UpdateCell(cases.INPUT_SIZE, cases.HIDDEN_SIZE, bias=False, leak=0.2),
    "coupled": CoupledLSTMCell(cases.INPUT_SIZE, cases.HIDDEN_SIZE),
}


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _mgu(x: list[np.ndarray], h: list[np.ndarray], carry: Any) -> Any:
    f = _sigmoid(x[1] + h[1])
    return (1 - f) * carry + f * np.tanh(x[0] + f * h[0])


def _update(x: list[np.ndarray], h: list[np.ndarray], carry: Any) -> Any:
    z, n = _sigmoid(x[0] + h[0]), np.maximum(x[1] + h[1], 0)
    return (1 - z) * (n - 0.2) + z * carry


def _coupled(x: list[np.ndarray], h: list[np.ndarray], carry: Any) -> Any:
    i, g, o = (a + b for a, b in zip(x, h, strict=True))
    i, g, o = _sigmoid(i), g / (1 + abs(g)), _sigmoid(o)
    c = (1 - i) * carry.c + i * g
    written = 0.9 * carry.written + i * c
    return CoupledCarry(o * np.tanh(c + 0.1 * written), c, written)


EQUATIONS: dict[str, Callable[..., Any]] = {"mgu": _mgu, "update": _update, "coupled": _coupled}
"""`(what comes from x, what comes from h, carry) -> carry`, by gate."""


def numpy_step(name: str, params: Any, carry: Any, x: np.ndarray) -> Any:
    """The new carry of the cell called `name`, in NumPy."""
    h = carry.h if isinstance(carry, tuple) else carry
    from_x, from_h = x @ params.w_ih, h @ params.w_hh
    if params.b_ih is not None:
        from_x, from_h = from_x + params.b_ih, from_h + params.b_hh
    units = h.shape[-1]
    gates = range(from_x.shape[-1] // units)
    parts = [[a[..., g * units : (g + 1) * units] for g in gates] for a in (from_x, from_h)]
    return EQUATIONS[name](*parts, carry)
