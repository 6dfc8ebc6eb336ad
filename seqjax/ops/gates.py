"""What a cell of gates says of itself, and the elementwise part of its step."""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

Activation = Callable[[jax.Array], jax.Array]


class State(NamedTuple):
    """The state between two steps, whatever a cell calls it."""

    h: jax.Array  # (*batch, features): what the recurrent weights multiply, and the output
    rest: tuple[jax.Array, ...]  # (*batch, hidden_size) each, in the accumulation dtype


class Gated(Protocol):
    """A recurrence of two products, activations, and an elementwise `combine`; hashable."""

    @property
    def gates(self) -> Mapping[str, Activation | None]:
        """Names, in the order of the weights' columns, each with its activation.

        The activation is of the sum of what comes from x and what comes from h. Where it is None,
        `combine` gets the two as a pair.
        """

    def combine(self, gates: Any, carry: Any) -> Any:
        """Elementwise, the new carry, its h not yet projected."""

    def split_carry(self, carry: Any) -> State:
        """The carry as the implementations know it."""

    def join_carry(self, state: State) -> Any:
        """The inverse of `split_carry`."""

    def projection(self, params: Any) -> jax.Array | None:
        """The weight that multiplies h at the end of a step, if there is one."""

    def __hash__(self) -> int: ...


def keeps_apart(cell: Gated) -> bool:
    """Whether what comes from x and what comes from h do more than add up."""
    return None in cell.gates.values()


def activate_and_combine(cell: Gated, from_x: jax.Array, from_h: jax.Array, state: State) -> State:
    """The elementwise part of a step, gate by gate; h is in the accumulation dtype, both ways."""
    count = len(cell.gates)
    parts = (jnp.split(product, count, axis=-1) for product in (from_x, from_h))
    gates = (
        (x, h) if activation is None else activation(x + h)
        for activation, x, h in zip(cell.gates.values(), *parts, strict=True)
    )
    return combine(cell, gates, state)


def combine(cell: Gated, gates: Iterable[Any], state: State) -> State:
    """`cell.combine` of what its gates are, in their order."""
    return cell.split_carry(cell.combine(named_gates(cell, gates), cell.join_carry(state)))


def named_gates(cell: Gated, gates: Iterable[Any]) -> Any:
    """What `cell.combine` gets: the gates in their order, as a NamedTuple."""
    return _gates_type(tuple(cell.gates))(*gates)


def equations(program: Any) -> Iterator[Any]:
    """Every equation of a jaxpr, those of jaxprs inside of it, too."""
    for equation in program.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


@functools.cache
def _gates_type(names: tuple[str, ...]) -> Any:
    return collections.namedtuple("Gates", names)
