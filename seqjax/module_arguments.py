"""The arguments and calls of the modules in `seqjax.nnx` and `seqjax.linen`, each written once.

A module derives from its class here, a plain dataclass whose fields become the module's own. The
class checks them, makes a layer of the core of them, and calls it; what is left to a module is to
hold the parameters, and to draw for dropout, as its library does. The class is the first base of a
module, which so has its call and the call's docstring: Flax's modules inherit others from `type`.
Types of calls are quoted, so that `help()` shows them as they are written.

Args:
  layer: the layer.
  input_size: features of the input.
  hidden_size: features of the state.
  num_layers: layers one after the other.
  nonlinearity: "tanh" or "relu".
  bias: whether there are biases.
  batch_first: inputs and outputs are `(*batch, T, features)`, not `(T, *batch, features)`; the
    layout of states stays.
  dropout: probability of zeroing an element of each layer's output but the last one's, in
    training.
  bidirectional: a second set of weights reads the sequence backwards; features double.
  proj_size: features of output and h when above 0; 0 means no projection.
  dtype: dtype to compute in, to which input, state and weights are cast; None: theirs, which
    must be the same.
  param_dtype: dtype of the weights.
  kernel_init: initializer of the input weights w_ih, `(key, shape, dtype) -> array`, as in
    `jax.nn.initializers` or `seqjax.initializers`. It draws each gate apart, of shape
    `(input_size, hidden_size)`. Flax's `with_partitioning` may wrap it, and names the axes of w_ih,
    all gates side by side. None: as the layer draws it (PyTorch's distribution), which is also how
    weights of other names than these are drawn.
  recurrent_kernel_init: the same for the recurrent weights w_hh, and for a projection's w_hr.
  bias_init: the same for the biases b_ih and b_hh, which are added. It draws all gates at once.
  implementation: as in `seqjax.scan`.
  remat: as in `seqjax.scan`.
  deterministic: True turns dropout off; given here or in the call.
  rngs: draws the weights ("params") and, where there is dropout, what it zeroes ("dropout").
"""

import dataclasses
import inspect
import re
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from seqjax import cells, torch_shape
from seqjax.cells.base import Carry, Cell, Layer, Params, check_layer, check_positive, check_type
from seqjax.cells.rnn import check_nonlinearity
from seqjax.initial_parameters import WEIGHTS, check_initializers
from seqjax.layers import Stack, check_dropout
from seqjax.output_and_state import OutputAndState

State = TypeVar("State")
"""What a module of PyTorch's gives back: `h`, or `(h, c)`."""
StateLike = TypeVar("StateLike")
"""What it takes for a state: NumPy's arrays, too."""
LSTMState = tuple[jax.Array, jax.Array]
LSTMStateLike = tuple[ArrayLike, ArrayLike]

Initializer = Callable[..., Any]
"""`(key, shape, dtype)` to an array, or to Flax's box around it."""

CellT = TypeVar("CellT", bound=Cell)
Module = TypeVar("Module", bound="ModuleArguments")
MEANINGS: dict[str, str] = dict(re.findall(r"^  (\w+): (.*(?:\n    .*)*)", __doc__ or "", re.M))


def documented(module: type[Module]) -> type[Module]:
    """Completes a module's docstring: a title, and an example unless it has its base's.

    The example of a base is written for an LSTM, and given to the others with their names.
    """
    docstrings = [inspect.cleandoc(cls.__doc__ or "") for cls in module.__mro__]
    example = next((doc[doc.index(">>>") :] for doc in docstrings if ">>>" in doc), "")
    names = inspect.signature(module.__init__).parameters
    meanings = [f"  {name}: {MEANINGS[name]}" for name in names if name in MEANINGS]
    before, after = [docstrings[0].partition("\n\n")[0]], []
    if issubclass(module, TorchArguments):
        name = module.__name__.removesuffix("Cell")
        source = f"https://docs.pytorch.org/docs/stable/generated/torch.nn.{module.__name__}.html"
        before.append(f"Equation: `seqjax.{name}Cell`. Source:\n{source}")
        after.append(
            "Raises:\n  TypeError, ValueError: where PyTorch raises, for sizes below 1, and for "
            "initializers\n    that find nothing to draw or give other shapes."
        )
        if name != "LSTM":
            example = example.replace("LSTM", name).replace("(h, c)", "h")
    module.__doc__ = "\n\n".join([*before, "\n".join(["Args:", *meanings]), *after, example])
    return module


# Flax has its own equality, hash and representation of modules.
@dataclasses.dataclass(eq=False, repr=False, kw_only=True)
class ModuleArguments:
    """What every module takes."""

    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: Initializer | None = None
    recurrent_kernel_init: Initializer | None = None
    bias_init: Initializer | None = None

    if TYPE_CHECKING:  # A field of `Recurrent`; a property of the others, each with its own type.

        @property
        def layer(self) -> Any: ...

    # With an underscore, as every method here: `nnx.tabulate` compiles a module's public ones.
    def _check(self) -> None:
        """Raises for arguments that do not make a layer, or what does not fit one."""
        check_initializers(self.layer, self._initializers)
        if self.dtype is not None:
            _check_floating("dtype", self.dtype)
        _check_floating("param_dtype", self.param_dtype)

    def _params(self) -> Params:
        """The parameters, which each library's modules hold in its way."""
        raise NotImplementedError

    @property
    def _initializers(self) -> dict[str, Initializer]:
        """Those that are given."""
        given = {name: getattr(self, name) for name in WEIGHTS}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def _compute_dtype(self) -> DTypeLike:
        return self.param_dtype if self.dtype is None else self.dtype


@dataclasses.dataclass(eq=False, repr=False, kw_only=True)
class SequenceArguments(ModuleArguments):
    """What modules that run over whole sequences take."""

    implementation: str | None = None
    remat: bool = False

    _apply: ClassVar[Any] = staticmethod(torch_shape.apply_recurrent)

    def _dropout_key(self, deterministic: bool | None) -> jax.Array | None:
        """What draws dropout in a call, in each library's way; None where nothing is dropped."""
        raise NotImplementedError

    def _run(
        self, input: Any, state: Any, deterministic: bool | None, *rngs: Any, **options: Any
    ) -> tuple[jax.Array, Any]:
        """A call with its `lengths` and `mask`; an NNX module's has `rngs`, too."""
        if not (deterministic is None or isinstance(deterministic, bool | np.bool_)):
            raise TypeError(
                "deterministic should be a bool that is known when tracing, or None, got: "
                f"{type(deterministic).__name__}. lengths= and mask= are given by name"
            )
        options["key"] = self._dropout_key(deterministic, *rngs)
        for name in ("batch_first", "dtype", "implementation", "remat"):
            options[name] = getattr(self, name)
        name = type(self).__name__
        output, state = self._apply(name, self.layer, self._params(), input, state, **options)
        # To type checkers a tuple, of which alone they know the types of what it unpacks to.
        return OutputAndState(output, state)  # type: ignore[return-value]


@dataclasses.dataclass(eq=False, repr=False)
class RecurrentArguments(SequenceArguments):
    """The arguments of `Recurrent`."""

    layer: Layer
    _: dataclasses.KW_ONLY
    batch_first: bool = False

    def _check(self) -> None:
        check_layer("layer", self.layer)
        check_type("batch_first", self.batch_first, bool)
        super()._check()

    def __call__(
        self,
        input: "ArrayLike",
        carry: "Carry | None" = None,
        deterministic: "bool | None" = None,
        *,
        lengths: "ArrayLike | None" = None,
        mask: "ArrayLike | None" = None,
    ) -> "tuple[jax.Array, Carry]":
        """Runs the layer over a sequence.

        Args:
          input: `(T, *batch, input_size)`, or `(*batch, T, input_size)` with `batch_first`.
          carry: initial state, as from `layer.initial_carry`; None means zeros.
          deterministic: True turns dropout off, False on. None: as `train()` and `eval()` set an
            NNX module; a Linen module that has dropout needs it here or in the constructor.
          lengths: integers `(*batch,)`: valid steps from the start of each row.
          mask: bool, the input's layout without features; True at valid steps.
          rngs: of an NNX module: overrides where dropout draws from. A Linen module draws from
            its "dropout" stream.

        Returns:
          `(output, carry)`: outputs in the input's layout, zero at padding, and the final state.
          It unpacks and indexes as a tuple does; where JAX compares structures, as
          `out_axes=(1, 1)` does, `tuple(...)` of it is one.
        """
        return self._run(input, carry, deterministic, lengths=lengths, mask=mask)

    def initial_state(self, batch_shape: "tuple[int, ...]" = ()) -> "Carry":
        """What `carry=None` means: `layer.initial_carry` for inputs in the dtype to compute in.

        Args:
          batch_shape: the input's, without time and features; () for one sequence.

        Returns:
          The state, in the structure and dtypes that a call gives it back in.

        Raises:
          TypeError: `batch_shape` is not a tuple.

        >>> import seqjax, seqjax.linen
        >>> recurrent = seqjax.linen.Recurrent(seqjax.LSTMCell(3, 5))
        >>> carry = recurrent.initial_state((2,))
        >>> carry.h.shape, carry.c.shape
        ((2, 5), (2, 5))
        """
        return torch_shape.zero_carry(self.layer, batch_shape, self._compute_dtype)


@dataclasses.dataclass(eq=False, repr=False)
class TorchArguments(ModuleArguments, Generic[State]):
    """What modules take that PyTorch has, too."""

    input_size: int
    hidden_size: int

    _kind: ClassVar[type[Any]]
    """The class of the cell of the core that reads the input."""

    def _cell(self) -> Any:
        """That cell: it takes the module's arguments of the same names."""
        names = self._kind.__dataclass_fields__.keys() & self.__dataclass_fields__.keys()
        return self._kind(**{name: getattr(self, name) for name in names})

    def initial_state(self, batch_shape: "tuple[int, ...]" = ()) -> "State":
        """What `hx=None` means: zeros, to start `jax.lax.scan` or `seqjax.generate` from.

        Args:
          batch_shape: `(batch,)`, or () for input without batch.

        Returns:
          The state, in the structure, layout and dtypes that a call gives it back in: `dtype`, or
          else `param_dtype`; an LSTM's c in float32 where that is a 16-bit one.

        Raises:
          TypeError, ValueError: `batch_shape` is not a tuple, or has more than one entry.

        >>> import jax.numpy as jnp, seqjax.linen
        >>> lstm = seqjax.linen.LSTM(10, 20, num_layers=2, dtype=jnp.bfloat16)
        >>> h, c = lstm.initial_state((3,))
        >>> h.shape, h.dtype.name, c.dtype.name
        ((2, 3, 20), 'bfloat16', 'float32')
        """
        name = type(self).__name__
        return torch_shape.zero_state(name, self.layer, batch_shape, self._compute_dtype)


@dataclasses.dataclass(eq=False, repr=False)
class _Sizes(TorchArguments[State]):
    num_layers: int = 1


@dataclasses.dataclass(eq=False, repr=False)
class LayerArguments(_Sizes[State], SequenceArguments, Generic[StateLike, State]):
    """The arguments that `RNN`, `LSTM` and `GRU` share."""

    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    bidirectional: bool = False

    _apply = staticmethod(torch_shape.apply_stack)

    @property
    def layer(self) -> Stack:
        """The layer of the core that the arguments stand for."""
        return torch_shape.build_stack(
            self._cell(), self.num_layers, self.dropout, self.bidirectional
        )

    def _check(self) -> None:
        """Raises where PyTorch does, in its order, and for a `bidirectional` that is no bool."""
        check_dropout(self.dropout)
        if self.dropout > 0 and self.num_layers == 1:
            warnings.warn(
                "dropout option adds dropout after all but last recurrent layer, so non-zero "
                f"dropout expects num_layers greater than 1, but got dropout={self.dropout} and "
                f"num_layers={self.num_layers}",
                stacklevel=_level_of_user(),
            )
        check_type("bias", self.bias, bool)
        check_type("batch_first", self.batch_first, bool)
        check_positive("input_size", self.input_size)
        check_positive("hidden_size", self.hidden_size)
        check_positive("num_layers", self.num_layers)
        check_type("bidirectional", self.bidirectional, bool)
        super()._check()

    def __call__(
        self,
        input: "ArrayLike",
        hx: "StateLike | None" = None,
        deterministic: "bool | None" = None,
        *,
        lengths: "ArrayLike | None" = None,
        mask: "ArrayLike | None" = None,
    ) -> "tuple[jax.Array, State]":
        """Runs the layer over a sequence, as PyTorch's `forward` does.

        Args:
          input: `(T, batch, input_size)`; `(batch, T, input_size)` with `batch_first`; or one
            sequence `(T, input_size)`.
          hx: initial state `(num_layers * num_directions, batch, size)`, for an LSTM a tuple
            `(h_0, c_0)` of two; without batch for one sequence. None means zeros.
          deterministic: True turns dropout off, False on. None: as `train()` and `eval()` set an
            NNX module; a Linen module that has dropout needs it here or in the constructor.
          lengths: integers `(batch,)` in [0, T], in any order: valid steps from the start of each
            row. A row of length 0 gives zeros and keeps its initial state.
          mask: bool, the input's layout without features; True at valid steps, in any pattern.
          rngs: of an NNX module: overrides where dropout draws from. A Linen module draws from
            its "dropout" stream.

        Returns:
          `(output, state)`: output in the input's layout with `num_directions * size` features,
          zero at padding; state as `hx`, taken at each row's last valid step. It unpacks and
          indexes as a tuple does; where JAX compares structures, as `out_axes=(1, 1)` does,
          `tuple(...)` of it is one.

        Raises:
          TypeError, ValueError: where PyTorch raises, and for `lengths` or `mask` that do not fit.
        """
        return self._run(input, hx, deterministic, lengths=lengths, mask=mask)


def _check_floating(name: str, dtype: Any) -> None:
    try:
        floating = dtype is not None and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:  # No dtype at all.
        floating = False
    if not floating:
        raise TypeError(f"{name} should be a floating dtype, got: {dtype}")


def _level_of_user() -> int:
    """How far up from our caller's line the one is that makes the module."""
    level = 1
    while sys._getframe(level).f_globals["__name__"].partition(".")[0] in ("seqjax", "flax"):
        level += 1
    return level


@dataclasses.dataclass(eq=False, repr=False)
class _SizesAndNonlinearity(_Sizes[State]):
    nonlinearity: str = "tanh"


@dataclasses.dataclass(eq=False, repr=False)
class RNNArguments(LayerArguments[ArrayLike, jax.Array], _SizesAndNonlinearity[jax.Array]):
    """The arguments of `RNN`; this order of bases puts `nonlinearity` where PyTorch has it."""

    _kind = cells.RNNCell

    def _check(self) -> None:
        check_nonlinearity(self.nonlinearity)  # PyTorch looks at it first.
        super()._check()


@dataclasses.dataclass(eq=False, repr=False)
class LSTMArguments(LayerArguments[LSTMStateLike, LSTMState]):
    """The arguments of `LSTM`."""

    _kind = cells.LSTMCell

    proj_size: int = 0


class GRUArguments(LayerArguments[ArrayLike, jax.Array]):
    """The arguments of `GRU`."""

    _kind = cells.GRUCell


@dataclasses.dataclass(eq=False, repr=False)
class CellArguments(TorchArguments[State], Generic[CellT, StateLike, State]):
    """The arguments that `RNNCell`, `LSTMCell` and `GRUCell` share."""

    bias: bool = True

    @property
    def layer(self) -> CellT:
        """The cell of the core that the arguments stand for."""
        return self._cell()

    def __call__(self, input: "ArrayLike", hx: "StateLike | None" = None) -> "State":
        """One step, as PyTorch's `forward` does it.

        Args:
          input: `(batch, input_size)` or `(input_size,)`.
          hx: state `(batch, hidden_size)` or `(hidden_size,)`, for an LSTM a tuple `(h, c)` of
            two; None means zeros.

        Returns:
          The new state: `h`, or `(h, c)`.

        Raises:
          TypeError, ValueError: where PyTorch raises.
        """
        name = type(self).__name__
        return torch_shape.apply_cell(name, self.layer, self._params(), input, hx, dtype=self.dtype)


@dataclasses.dataclass(eq=False, repr=False)
class RNNCellArguments(CellArguments[cells.RNNCell, ArrayLike, jax.Array]):
    """The arguments of `RNNCell`."""

    _kind = cells.RNNCell

    nonlinearity: str = "tanh"


class LSTMCellArguments(CellArguments[cells.LSTMCell, LSTMStateLike, LSTMState]):
    """The arguments of `LSTMCell`."""

    _kind = cells.LSTMCell


class GRUCellArguments(CellArguments[cells.GRUCell, ArrayLike, jax.Array]):
    """The arguments of `GRUCell`."""

    _kind = cells.GRUCell
