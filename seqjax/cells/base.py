"""What a layer is, what a cell adds to it, and the arithmetic that all cells share."""

import abc
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import jax
import jax.numpy as jnp
from jax.export import register_namedtuple_serialization
from jax.typing import DTypeLike

from seqjax.cells.checks import check_step
from seqjax.initializers import torch_uniform
from seqjax.ops import reference
from seqjax.ops.dispatch import choose_implementation
from seqjax.ops.masking import zero_padding
from seqjax.ops.rematerialization import in_chunks
from seqjax.ops.sharding import run_own_rows

Carry = Any
"""A pytree of arrays `(*batch, features)`: the state between two steps."""
Params = Any
"""A pytree of arrays: the weights."""

if TYPE_CHECKING:  # Only type checkers need the defaults, which `typing` has from Python 3.13 on.
    import typing_extensions

    ParamsT = typing_extensions.TypeVar("ParamsT", default=Any)
    CarryT = typing_extensions.TypeVar("CarryT", default=Any)
else:
    ParamsT = TypeVar("ParamsT")
    CarryT = TypeVar("CarryT")

NamedTupleType = TypeVar("NamedTupleType")


class Layer(abc.ABC, Generic[ParamsT, CarryT]):
    """A recurrent layer as a hashable description of pure functions; it holds no arrays.

    Cells and compositions of cells (`Stack`, `Bidirectional`) are layers. Run one over a sequence
    with `seqjax.scan`, or a step at a time with `step`. A recurrence of your own derives from
    `Cell`; a composition that runs its parts over the sequence in its own way derives from this.
    Type checkers know its parameters and carry from `Layer[MyParams, MyCarry]`; without, as `Any`.

    >>> import seqjax
    >>> isinstance(seqjax.Stack([seqjax.GRUCell(3, 5)]), seqjax.Layer)
    True
    """

    input_size: int
    """Number of features of one input `x`."""

    zeroes_padding: ClassVar[bool] = False
    """Whether `run` takes inputs at padding for zeros by itself; else `run_layer` makes them so.

    It is said beside `run`: a derived class with another `run` says it again.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "step" in vars(cls):  # Here, so that no class that writes a step has to check anything.
            cls.step = _checked(cls.step)  # type: ignore[method-assign]

    @property
    @abc.abstractmethod
    def output_size(self) -> int:
        """Number of features of one output `y`."""

    @property
    def draws_dropout(self) -> bool:
        """Whether a run with a key (training) differs from one without."""
        return False

    @abc.abstractmethod
    def init(self, key: jax.Array, dtype: DTypeLike = jnp.float32) -> ParamsT:
        """Draws the parameters.

        What `scan` and `step` are given is compared with them: which arrays there are, and their
        shapes, is up to the layer's fields alone.
        """

    @abc.abstractmethod
    def initial_carry(
        self, batch_shape: tuple[int, ...] = (), dtype: DTypeLike = jnp.float32
    ) -> CarryT:
        """The state before the first step: zeros."""

    @abc.abstractmethod
    def step(self, params: ParamsT, carry: CarryT, x: jax.Array) -> tuple[CarryT, jax.Array]:
        """One time step: `(carry, x) -> (carry, y)`, with `x` of shape `(*batch, input_size)`.

        Whoever writes one need not check what it is given: it is what `scan` takes, in the layer's
        own structures, or an error was raised before.
        """

    @abc.abstractmethod
    def run(
        self,
        params: ParamsT,
        carry: CarryT,
        xs: jax.Array,
        *,
        mask: jax.Array | None,
        reverse: bool,
        key: jax.Array | None,
        unroll: int,
        implementation: str | None,
        remat: bool,
    ) -> tuple[CarryT, jax.Array]:
        """The whole sequence, for `run_layer`. `seqjax.scan` has checked the arguments."""


class Cell(Layer[ParamsT, CarryT]):
    """One recurrence: its `step` is its meaning, and `run` scans that step over time.

    Derive from it for a cell of your own, unless it is a `GatedCell`: a frozen dataclass with
    `input_size`, `output_size`, `init`, `initial_carry` and `step`. It then works in `seqjax.scan`,
    `Stack`, `Bidirectional` and the Flax modules' `Recurrent`, masks included.

    >>> import dataclasses, jax, jax.numpy as jnp, seqjax
    >>> @dataclasses.dataclass(frozen=True)
    ... class Decay(seqjax.Cell):
    ...     input_size: int
    ...
    ...     @property
    ...     def output_size(self):
    ...         return self.input_size
    ...
    ...     def init(self, key, dtype=jnp.float32):
    ...         return {"rate": jax.random.uniform(key, (), dtype)}
    ...
    ...     def initial_carry(self, batch_shape=(), dtype=jnp.float32):
    ...         return jnp.zeros((*batch_shape, self.input_size), dtype)
    ...
    ...     def step(self, params, carry, x):
    ...         carry = params["rate"] * carry + x
    ...         return carry, carry
    >>> cell = Decay(input_size=3)
    >>> carry, ys = seqjax.scan(cell, cell.init(jax.random.key(0)), jnp.ones((7, 2, 3)))
    >>> ys.shape
    (7, 2, 3)
    """

    zeroes_padding: ClassVar[bool] = True

    def run(
        self,
        params: ParamsT,
        carry: CarryT,
        xs: jax.Array,
        *,
        mask: jax.Array | None,
        reverse: bool,
        key: jax.Array | None,
        unroll: int,
        implementation: str | None,
        remat: bool,
    ) -> tuple[CarryT, jax.Array]:
        del key  # A cell draws nothing; dropout sits between layers.
        run = functools.partial(self._choose(implementation, xs), reverse=reverse, unroll=unroll)
        if xs.shape[0] == 0:  # No loop that nothing enters: XLA stumbles over some.
            run = functools.partial(reference.no_steps, self.step)
        elif remat:
            run = functools.partial(in_chunks, run, reverse=reverse)
        return run_own_rows(run, params, carry, xs, mask)

    def _choose(self, implementation: str | None, xs: jax.Array) -> Callable[..., Any]:
        """What runs the cell over `xs`: `(params, carry, xs, mask, reverse, unroll)`."""
        reason = "this cell is no GatedCell, from whose gates it is derived"
        choose_implementation(implementation, {"xla": reason})
        return functools.partial(reference.scan, self.step)


def _checked(step: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's `step` that is given what `scan` would give it, or raises what `scan` would."""

    @functools.wraps(step)
    def checked_step(
        layer: Layer, params: Params, carry: Carry, x: jax.Array, *args: Any, **options: Any
    ) -> Any:
        # By `super().step` a class may call another's, with parameters and a state of its own.
        if type(layer).step is checked_step:
            check_layer("layer", layer)
            params, carry, x = check_step(layer, params, carry, x)
        return step(layer, params, carry, x, *args, **options)

    return checked_step


def run_layer(
    layer: Layer[ParamsT, CarryT],
    params: ParamsT,
    carry: CarryT,
    xs: jax.Array,
    *,
    mask: Any,
    **options: Any,
) -> tuple[CarryT, jax.Array]:
    """`layer.run`, to which no input at padding is anything but zero."""
    # The class that gives the layer its `run`.
    owner = next(cls for cls in type(layer).__mro__ if "run" in vars(cls))
    if not vars(owner).get("zeroes_padding", False):
        xs = zero_padding(mask, xs)
    return layer.run(params, carry, xs, mask=mask, **options)


def exportable(cls: type[NamedTupleType]) -> type[NamedTupleType]:
    """Lets `jax.export` write functions whose arguments or results hold this NamedTuple."""
    register_namedtuple_serialization(cls, serialized_name=f"seqjax.{cls.__name__}")
    return cls


def draw_weights(
    key: jax.Array, hidden_size: int, dtype: DTypeLike, **shapes: tuple[int, ...] | None
) -> dict[str, Any]:
    """Draws each named array with PyTorch's distribution; a shape of None stays None."""
    init = torch_uniform(hidden_size)
    keys = jax.random.split(key, len(shapes))
    return {
        name: None if shape is None else init(subkey, shape, dtype)
        for subkey, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def check_layer(name: str, value: object) -> None:
    """Raises TypeError unless `value` is a layer, and hashable."""
    if not isinstance(value, Layer):
        raise TypeError(
            f"{name} should be a seqjax layer (a cell, Stack or Bidirectional), "
            f"got: {type(value).__name__}"
        )
    try:
        hash(value)
    except TypeError as error:
        raise TypeError(
            f"{name} should be hashable, got: {type(value).__name__} ({error}). A dataclass of "
            "hashable fields is, with @dataclasses.dataclass(frozen=True)"
        ) from None


def check_type(name: str, value: object, expected: type) -> None:
    """Raises PyTorch's TypeError unless `value` is an `expected`; a bool is not an int here."""
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise TypeError(
            f"{name} should be of type {expected.__name__}, got: {type(value).__name__}"
        )


def check_positive(name: str, value: object) -> None:
    """Raises unless `value` is an int greater than zero."""
    check_type(name, value, int)
    if value <= 0:  # type: ignore[operator]
        raise ValueError(f"{name} must be greater than zero, got: {value}")
