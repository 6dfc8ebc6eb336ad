"""A cell's elementwise part, as XLA vectorises it on a CPU, and its derivative.

Both follow from the cell's `gates` and `combine`. What is kept of a step for the derivative is what
`combine` gets of the gates: the slope of a known activation follows from its value, so that no
activation is computed twice.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from seqjax.ops.gates import Activation, Gated, State, combine, equations
from seqjax.ops.precision import widen

Saved = tuple[jax.Array | None, ...]
"""Arrays `(*steps, rows, hidden_size)`: what `combine` gets of the gates. None: it is the new h."""

Factors = tuple[dict[int, jax.Array], ...]
"""Of each output, the partial derivatives `(*steps, rows, hidden_size)` by what it depends on.

Each is an array of its own: in a loop, XLA vectorises the reading of several arrays at one index,
but not of several slices of one.
"""

barrier: Callable[..., Any] = jax.lax.optimization_barrier
"""XLA fuses nothing across it, and merges nothing behind it with what stands before."""

SCALES: dict[Activation | None, float] = {
    jnp.tanh: 1.0,
    jax.lax.tanh: 1.0,
    jax.nn.sigmoid: 0.5,
    jax.lax.logistic: 0.5,
}
"""Functions that are `(1 - scale) + scale * tanh(scale * x)`: one tanh of one array serves many.

A sigmoid made of tanh is as exact as any number near 1, but not near 0, relative to itself.
"""

KEEP_ERRORS = {
    *("add", "sub", "mul", "neg", "abs", "max", "min", "tanh", "logistic", "select_n"),
    *("lt", "le", "gt", "ge", "eq", "ne", "jit", "pjit", "convert_element_type", "copy"),
}
"""Operations after which a small error is still small, unlike after a logarithm or a division."""

SLOPES: dict[Activation | None, Callable[[jax.Array], jax.Array]] = {
    jnp.tanh: lambda y: 1 - y * y,
    jax.lax.tanh: lambda y: 1 - y * y,
    jax.nn.sigmoid: lambda y: y * (1 - y),
    jax.lax.logistic: lambda y: y * (1 - y),
    jax.nn.relu: lambda y: (y > 0).astype(y.dtype),
}
"""An activation's derivative, from its value. Of any other its argument is kept, not its value."""


def step(
    cell: Gated, from_x: jax.Array, from_h: jax.Array, state: State, valid: jax.Array | None
) -> tuple[State, Saved]:
    """The new state, its h wide and not yet projected, and what the derivative needs.

    Where `valid`, bool (rows, 1), is off, `rest` is as it was; h may be anything.
    """
    gates = _activate(cell, from_x, from_h, kept=len(state.rest))
    inputs = (*gates, widen(state.h), *state.rest)
    if valid is None:
        h, *new_rest = _outputs(cell, *inputs)
        rest = [barrier(array) for array in new_rest]
    else:
        # h comes of the rest that is kept. Of one selected later, XLA would compute it for each.
        of_h, *of_rest = _programs(cell, inputs)
        new_rest = [_run(program, inputs) for program in of_rest]
        kept = zip(new_rest, state.rest, strict=True)
        rest = [barrier(jnp.where(valid, new, old)) for new, old in kept]
        h = _run(of_h, (*inputs, *rest))
    return State(h, tuple(rest)), gates


def hidden(cell: Gated, saved: Saved, before: State, h: jax.Array) -> jax.Array:
    """The h of saved steps, not yet projected."""
    return _outputs(cell, *_inputs(saved, before, h))[0]


def factors(cell: Gated, saved: Saved, before: State, h: jax.Array) -> Factors:
    """What `tangent` multiplies tangents by: the partial derivatives of h, and of each of `rest`.

    They are by the inputs of `combine`, an activated gate standing for its argument. Those of h are
    by the new `rest` besides: what h depends on through it alone is followed once.

    Args:
      cell: the cell.
      saved: of the steps.
      before: the states before them.
      h: their new h.
    """
    inputs = _inputs(saved, before, h)
    of_h, *of_rest = _programs(cell, inputs)
    rest = [_run(program, inputs) for program in of_rest]
    slopes = _slopes(cell.gates.values(), inputs)

    def partials(program: ClosedJaxpr) -> dict[int, jax.Array]:
        value, pullback = jax.vjp(lambda *values: _run(program, values), *inputs, *rest)
        found = pullback(jnp.ones_like(value))
        return {
            index: found[index] * slopes[index] if index in slopes else found[index]
            for index in _read(program.jaxpr)
        }

    return partials(of_h), *map(partials, of_rest)


def tangent(
    cell: Gated, factors: Factors, d_from_x: jax.Array | None, d_from_h: jax.Array, d: State
) -> State:
    """The derivative of a step: linear in `d_from_x`, `d_from_h` and `d`.

    Where `d_from_x` is None, `d_from_h` is that of both products' sum, or x does not move.
    """
    count = len(cell.gates)
    of_h = jnp.split(d_from_h, count, axis=-1)
    of_x = [None] * count if d_from_x is None else jnp.split(d_from_x, count, axis=-1)
    inputs: list[Any] = []
    for activation, x, h in zip(cell.gates.values(), of_x, of_h, strict=True):
        inputs += [x, h] if activation is None else [h if x is None else x + h]
    inputs += [d.h, *d.rest]

    def follow(factors: dict[int, jax.Array], values: Sequence[Any]) -> jax.Array:
        terms = [f * values[index] for index, f in factors.items() if values[index] is not None]
        return functools.reduce(operator.add, terms) if terms else jnp.zeros_like(of_h[0])

    h_by, *rest_by = factors
    rest = [follow(by, inputs) for by in rest_by]
    return State(follow(h_by, [*inputs, *rest]), tuple(rest))


def _activate(
    cell: Gated, from_x: jax.Array, from_h: jax.Array, *, kept: int
) -> tuple[jax.Array, ...]:
    """What `combine` gets of the gates: one array a gate, or two that are kept apart.

    Fused with what takes the gates apart, XLA computes a tanh element by element. So gates side by
    side share one, and a barrier or, stronger, a concatenation has it written out.
    """
    activations = tuple(cell.gates.values())
    count = len(activations)
    units = from_h.shape[-1] // count
    scales = {a: s for a, s in SCALES.items() if s == 1 or _keeps_errors(cell, kept)}
    runs = [list(run) for _, run in itertools.groupby(activations, lambda a: a in scales or a)]
    edges = list(itertools.accumulate(units * len(run) for run in runs[:-1]))
    written = []
    for run, x, h in zip(
        runs, jnp.split(from_x, edges, -1), jnp.split(from_h, edges, -1), strict=True
    ):
        activation = run[0]
        if activation is None:
            written.append(h)
        elif activation in scales:
            scale = np.repeat(np.array([[scales[a] for a in run]], x.dtype), units, axis=1)
            written.append((1 - scale) + scale * jnp.tanh((x + h) * scale))
        else:
            written.append(activation(x + h) if activation in SLOPES else x + h)
    together = barrier(written[0] if len(written) == 1 else jnp.concatenate(written, axis=-1))
    gates: list[jax.Array] = []
    for activation, x, gate in zip(
        activations, jnp.split(from_x, count, -1), jnp.split(together, count, -1), strict=True
    ):
        gates += [x, gate] if activation is None else [gate]
    return tuple(gates)


@functools.lru_cache
def _keeps_errors(cell: Gated, kept: int) -> bool:
    """Whether `combine` does no more than `KEEP_ERRORS` does."""
    parts = sum(2 if activation is None else 1 for activation in cell.gates.values())
    numbers = [np.float32(0.5)] * (parts + 1 + kept)
    program = jax.make_jaxpr(functools.partial(_outputs, cell))(*numbers)
    return {equation.primitive.name for equation in equations(program.jaxpr)} <= KEEP_ERRORS


def _inputs(saved: Saved, before: State, h: jax.Array) -> tuple[jax.Array, ...]:
    return *(h if value is None else value for value in saved), before.h, *before.rest


def _outputs(cell: Gated, *inputs: jax.Array) -> tuple[jax.Array, ...]:
    """h, and `rest`, by what `_activate` gives, h and `rest`."""
    arrays = iter(inputs)

    def gate(activation: Activation | None) -> Any:
        if activation is None:
            return next(arrays), next(arrays)
        return next(arrays) if activation in SLOPES else activation(next(arrays))

    gates = [gate(activation) for activation in cell.gates.values()]
    state = combine(cell, gates, State(next(arrays), tuple(arrays)))
    return state.h, *state.rest


def _slopes(
    activations: Iterable[Activation | None], inputs: Sequence[jax.Array]
) -> dict[int, jax.Array]:
    """The slopes of activated gates, by their places among the inputs."""
    slopes = {}
    index = 0
    for activation in activations:
        if activation in SLOPES:
            slopes[index] = SLOPES[activation](inputs[index])
        index += 2 if activation is None else 1
    return slopes


def _programs(cell: Gated, inputs: Sequence[jax.Array]) -> list[ClosedJaxpr]:
    """For each of `_outputs` a program: h by the inputs and, where it can be, the new `rest`."""
    whole = jax.make_jaxpr(functools.partial(_outputs, cell))(*inputs)
    h, *rest = whole.jaxpr.outvars
    programs = [whole.jaxpr.replace(outvars=[array]) for array in (h, *rest)]
    new = _variables(rest)
    makers = [e for e in whole.jaxpr.eqns if not new.isdisjoint(e.outvars)]
    if sum(len(equation.outvars) for equation in makers) == len(new) == len(rest):
        programs[0] = whole.jaxpr.replace(
            invars=[*whole.jaxpr.invars, *rest],
            eqns=[equation for equation in whole.jaxpr.eqns if equation not in makers],
            outvars=[h],
        )
    return [ClosedJaxpr(program, whole.consts) for program in programs]


def _run(program: ClosedJaxpr, values: Sequence[jax.Array]) -> jax.Array:
    """Its output; values behind those that it takes are left out."""
    return jaxpr_as_fun(program)(*values[: len(program.jaxpr.invars)])[0]


def _read(jaxpr: Jaxpr) -> list[int]:
    """Which of the inputs the output is computed from."""
    needed = _variables(jaxpr.outvars)
    for equation in reversed(jaxpr.eqns):
        if not needed.isdisjoint(equation.outvars):
            needed |= _variables(equation.invars)
    return [index for index, variable in enumerate(jaxpr.invars) if variable in needed]


def _variables(atoms: Iterable[Any]) -> set[Any]:
    return {atom for atom in atoms if not isinstance(atom, Literal)}
