"""A recurrence that is its gates and how they are combined: everything else follows."""

import abc
import dataclasses
import functools
import keyword
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from seqjax.cells.base import (
    CarryT,
    Cell,
    ParamsT,
    check_positive,
    check_type,
    draw_weights,
    exportable,
)
from seqjax.ops import reference
from seqjax.ops.dispatch import choose_implementation, why_not_xla
from seqjax.ops.gates import Activation, State, activate_and_combine, equations, named_gates
from seqjax.ops.precision import accumulation_dtype, cast, project, widen
from seqjax.ops.whole_sequence.scan import scan as whole_sequence_scan


@exportable
class GatedParams(NamedTuple):
    """Weights of a `GatedCell`, ready to multiply, gates side by side in the cell's order."""

    w_ih: jax.Array  # (input_size, gates * hidden_size)
    w_hh: jax.Array  # (output_size, gates * hidden_size)
    b_ih: jax.Array | None  # (gates * hidden_size,)
    b_hh: jax.Array | None  # (gates * hidden_size,)


@dataclasses.dataclass(frozen=True)
class GatedCell(Cell[ParamsT, CarryT]):
    """A recurrence of two products, activations, and an elementwise `combine`.

    ```
    from_x = x W_ih + b_ih
    from_h = h W_hh + b_hh                    each (*batch, gates * hidden_size)
    gate   = activation(from_x + from_h)      or without one, the pair (from_x, from_h)
    carry' = combine(gates, carry)
    ```

    Derive from it and give `gates` and `combine`: parameters and their initialisation, the first
    carry, the step, whole sequences with a derivative of their own (`implementation="xla"`), masks
    and the Flax modules' `Recurrent` follow. Here is the minimal gated unit of Zhou et al. (2016),
    whole:

    >>> import jax, jax.numpy as jnp, seqjax
    >>> class MGUCell(seqjax.GatedCell):
    ...     gates = {"f": jax.nn.sigmoid, "n": None}
    ...
    ...     def combine(self, gates, h):
    ...         n_x, n_h = gates.n
    ...         return (1 - gates.f) * h + gates.f * jnp.tanh(n_x + gates.f * n_h)
    >>> cell = MGUCell(input_size=3, hidden_size=5)
    >>> params = cell.init(jax.random.key(0))
    >>> params.w_ih.shape
    (3, 10)
    >>> carry, ys = seqjax.scan(cell, params, jnp.ones((7, 2, 3)))
    >>> ys.shape
    (7, 2, 5)

    A state of more than h is a NamedTuple, named as `carry_type`: its first field is h, what the
    recurrent weights multiply and the cell puts out, in the input's dtype; the others, like
    everything that `combine` gets and gives, are kept in float32 at least. An LSTM whose forget
    gate is one minus its input gate:

    >>> class CoupledLSTMCell(seqjax.GatedCell):
    ...     gates = {"i": jax.nn.sigmoid, "g": jnp.tanh, "o": jax.nn.sigmoid}
    ...     carry_type = seqjax.LSTMCarry
    ...
    ...     def combine(self, gates, carry):
    ...         c = (1 - gates.i) * carry.c + gates.i * gates.g
    ...         return seqjax.LSTMCarry(gates.o * jnp.tanh(c), c)

    Args:
      input_size: features of `x`.
      hidden_size: features of every gate, and of `h`.
      bias: whether there are biases.

    Raises:
      TypeError: a size is not an int, or bias not a bool; in a derived class, `gates` is no mapping
        of names to functions, or `combine` is not elementwise.
      ValueError: a size is below 1.
    """

    carry_type: ClassVar[Any] = None
    """NamedTuple of the state, h first; None where the state is h alone."""
    params_type: ClassVar[Any] = GatedParams
    """NamedTuple of the parameters, with the names of `param_shapes`."""

    input_size: int
    hidden_size: int
    bias: bool = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not isinstance(cls.gates, property):
            check_gates(cls.__name__, cls.gates)
        if cls.carry_type is not None and not hasattr(cls.carry_type, "_fields"):
            raise TypeError(
                f"{cls.__name__}.carry_type should be None or a NamedTuple, h first, "
                f"got: {cls.carry_type!r}"
            )

    def __post_init__(self) -> None:
        check_type("bias", self.bias, bool)
        check_positive("input_size", self.input_size)
        check_positive("hidden_size", self.hidden_size)

    @property
    @abc.abstractmethod
    def gates(self) -> Mapping[str, Activation | None]:
        """Names, in the order of the weights' columns, each with its activation, or None.

        An activation is any elementwise function. Of `jax.nn.sigmoid`, `jnp.tanh` and `jax.nn.relu`
        the derivative is found from the value alone, which is faster.
        """

    @abc.abstractmethod
    def combine(self, gates: Any, carry: CarryT) -> CarryT:
        """The new carry, elementwise, from the gates by name and the carry.

        All arrays have one shape, of a step or of many at a time, `(..., hidden_size)`, in float32
        at least. A gate without activation is a pair: what comes from x, and what comes from h.
        """

    @property
    def output_size(self) -> int:
        return self.hidden_size

    def param_shapes(self) -> dict[str, tuple[int, ...] | None]:
        """The shape of each parameter by name; None: there is no such array."""
        width = len(self.gates) * self.hidden_size
        return {
            "w_ih": (self.input_size, width),
            "w_hh": (self.output_size, width),
            "b_ih": (width,) if self.bias else None,
            "b_hh": (width,) if self.bias else None,
        }

    def init(self, key: jax.Array, dtype: DTypeLike = jnp.float32) -> ParamsT:
        """Draws the parameters from PyTorch's distribution."""
        return self.params_type(**draw_weights(key, self.hidden_size, dtype, **self.param_shapes()))

    def initial_carry(
        self, batch_shape: tuple[int, ...] = (), dtype: DTypeLike = jnp.float32
    ) -> CarryT:
        """Zeros: h in `dtype`, the rest of the state in float32 at least."""
        h = jnp.zeros((*batch_shape, self.output_size), dtype)
        wide = jnp.zeros((*batch_shape, self.hidden_size), accumulation_dtype(dtype))
        return self.join_carry(State(h, (wide,) * self._kept_beside_h()))

    def step(self, params: ParamsT, carry: CarryT, x: jax.Array) -> tuple[CarryT, jax.Array]:
        """One time step."""
        check_combine(self)
        h, rest = self.split_carry(carry)
        weights: Any = params  # Whatever the type, it has the names of `param_shapes`.
        from_x = project(x, weights.w_ih, weights.b_ih)
        from_h = project(h, weights.w_hh, weights.b_hh)
        h, rest = activate_and_combine(self, from_x, from_h, State(widen(h), rest))
        h = cast(h, x.dtype)
        weight = self.projection(params)
        if weight is not None:
            h = cast(project(h, weight), x.dtype)
        return self.join_carry(State(h, rest)), h

    def _kept_beside_h(self) -> int:
        """How many arrays the state has besides h."""
        return 0 if self.carry_type is None else len(self.carry_type._fields) - 1

    def _choose(self, implementation: str | None, xs: jax.Array) -> Callable[..., Any]:
        check_combine(self)
        if type(self).step is GatedCell.step:
            reason = why_not_xla(xs)
        else:
            reason = f"{type(self).__name__} has a step of its own"
        if choose_implementation(implementation, {"xla": reason}) == "xla":
            return functools.partial(whole_sequence_scan, self)
        return functools.partial(reference.scan, self.step)

    # What the implementations ask of a cell: see `seqjax.ops.gates`.

    def projection(self, params: ParamsT) -> jax.Array | None:
        """The weight that multiplies h at the end of a step, if there is one."""
        return None

    def split_carry(self, carry: Any) -> State:
        """h, and what else is kept."""
        h, *rest = (carry,) if self.carry_type is None else carry
        return State(h, tuple(rest))

    def join_carry(self, state: State) -> Any:
        """The inverse of `split_carry`."""
        return state.h if self.carry_type is None else self.carry_type(state.h, *state.rest)


def check_gates(name: str, gates: object) -> None:
    """Raises TypeError unless the gates of the cell `name` map names to functions or None."""

    def is_name(gate: object) -> bool:
        return isinstance(gate, str) and gate.isidentifier() and not keyword.iskeyword(gate)

    if (
        not isinstance(gates, Mapping)
        or not gates
        or not all(
            is_name(gate) and not gate.startswith("_") and (function is None or callable(function))
            for gate, function in gates.items()
        )
    ):
        raise TypeError(
            f"{name}.gates should map at least one name to an activation, or to None, for example "
            f"{{'z': jax.nn.sigmoid, 'n': None}}, got: {gates!r}"
        )


@functools.lru_cache
def check_combine(cell: GatedCell) -> None:
    """Raises TypeError unless the cell's `combine` and activations are elementwise.

    Tried on single numbers, in the abstract: what looks along an axis finds none, and what reduces
    all axes shows in the program.
    """
    name = type(cell).__name__
    check_gates(name, cell.gates)
    number: Any = jax.eval_shape(lambda: jnp.float32(0))
    state = State(number, (number,) * cell._kept_beside_h())
    parts = [(number, number) if function is None else number for function in cell.gates.values()]

    def combine_numbers(parts: Any, state: State) -> Any:
        gates = [
            part if function is None else function(part)
            for function, part in zip(cell.gates.values(), parts, strict=True)
        ]
        carry = cell.join_carry(state)
        return carry, cell.combine(named_gates(cell, gates), carry)

    try:
        program, (carry, new_carry) = jax.make_jaxpr(combine_numbers, return_shape=True)(
            parts, state
        )
    except Exception as error:
        error.add_note(f"seqjax tried {name}.combine on single numbers: it should be elementwise")
        raise
    kinds = [
        jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)
        for tree in (carry, new_carry)
    ]
    if kinds[0] != kinds[1]:
        raise TypeError(
            f"{name}.combine should return a carry like the one that it gets, of single numbers "
            f"{kinds[0]}, got: {kinds[1]}"
        )
    if foreign := sorted({*_not_elementwise(program.jaxpr)}):
        raise TypeError(
            f"{name}.combine and its activations should be elementwise, got: {', '.join(foreign)}. "
            "A recurrence that is not derives from seqjax.Cell and writes its own step"
        )


def _not_elementwise(jaxpr: Any) -> Iterator[str]:
    """Names of operations that would look beyond a single number."""
    for equation in equations(jaxpr):
        name = equation.primitive.name
        has_axes = any(variable.aval.shape for variable in (*equation.invars, *equation.outvars))
        if has_axes or name.startswith(("reduce_", "arg", "rev", "transpose", "broadcast")):
            yield name
