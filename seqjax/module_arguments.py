"""The arguments of the modules in `seqjax.nnx` and `seqjax.linen`, each written once.

A module derives from its class here, a plain dataclass whose fields become the module's own. The
class checks them and makes a layer of the core of them; what is left to a module is to hold the
parameters as its library does. A `__call__` here is there for its docstring, which a module's own
inherits; the class is the first base for that, as Flax's modules inherit another from `type`.

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
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from seqjax import cells
from seqjax.cells.base import Cell, Layer, check_layer, check_positive, check_type
from seqjax.cells.rnn import check_nonlinearity
from seqjax.layers import Stack, check_dropout
from seqjax.torch_shape import build_stack

State = TypeVar("State")
"""What a module of PyTorch's gives back: `h`, or `(h, c)`."""
StateLike = TypeVar("StateLike")
"""What it takes for a state: NumPy's arrays, too."""
LSTMState = tuple[jax.Array, jax.Array]
LSTMStateLike = tuple[ArrayLike, ArrayLike]

Module = TypeVar("Module", bound="ModuleArguments")
MEANINGS: dict[str, str] = dict(re.findall(r"^  (\w+): (.*(?:\n    .*)*)", __doc__ or "", re.M))


def documented(module: type[Module]) -> type[Module]:
    """Completes a module's docstring, between its first line and its example."""
    title, _, example = inspect.cleandoc(module.__doc__ or "").partition("\n\n")
    names = inspect.signature(module.__init__).parameters
    meanings = [f"  {name}: {MEANINGS[name]}" for name in names if name in MEANINGS]
    sections = [title, "\n".join(["Args:", *meanings]), example]
    if issubclass(module, LayerArguments | CellArguments):
        cell = module.__name__.removesuffix("Cell") + "Cell"
        source = f"https://docs.pytorch.org/docs/stable/generated/torch.nn.{module.__name__}.html"
        sections.insert(1, f"Equation: `seqjax.{cell}`. Source:\n{source}")
        sections.insert(
            3, "Raises:\n  TypeError, ValueError: where PyTorch raises, and for sizes below 1."
        )
    module.__doc__ = "\n\n".join(sections)
    return module


# Flax has its own equality, hash and representation of modules.
@dataclasses.dataclass(eq=False, repr=False)
class ModuleArguments:
    """What every module takes."""

    _: dataclasses.KW_ONLY
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    if TYPE_CHECKING:  # A field of `Recurrent`; a property of the others, each with its own type.

        @property
        def layer(self) -> Any: ...

    # With an underscore, as every method here: `nnx.tabulate` compiles a module's public ones.
    def _check(self) -> None:
        """Raises for arguments that do not make a layer."""
        _ = self.layer


@dataclasses.dataclass(eq=False, repr=False)
class SequenceArguments(ModuleArguments):
    """What modules that run over whole sequences take."""

    _: dataclasses.KW_ONLY
    implementation: str | None = None
    remat: bool = False

    def _apply(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Calls `torch_shape.apply_recurrent`, or one like it, with what the module knows."""
        names = ("batch_first", "dtype", "implementation", "remat")
        options |= {name: getattr(self, name) for name in names}
        return function(type(self).__name__, self.layer, *args, **options)


@dataclasses.dataclass(eq=False, repr=False)
class RecurrentArguments(SequenceArguments):
    """The arguments of `Recurrent`."""

    layer: Layer
    _: dataclasses.KW_ONLY
    batch_first: bool = False

    def _check(self) -> None:
        check_layer("layer", self.layer)
        check_type("batch_first", self.batch_first, bool)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the layer over a sequence.

        Args:
          input: `(T, *batch, input_size)`, or `(*batch, T, input_size)` with `batch_first`.
          carry: initial state, as from `layer.initial_carry`; None means zeros.
          lengths: integers `(*batch,)`: valid steps from the start of each row.
          mask: bool, the input's layout without features; True at valid steps.
          deterministic: True turns dropout off, False on. None: as `train()` and `eval()` set an
            NNX module; a Linen module that has dropout needs it here or in the constructor.
          rngs: of an NNX module: overrides where dropout draws from. A Linen module draws from
            its "dropout" stream.

        Returns:
          `(output, carry)`: outputs in the input's layout, zero at padding, and the final state.
        """


@dataclasses.dataclass(eq=False, repr=False)
class _Sizes:
    input_size: int
    hidden_size: int
    num_layers: int = 1


@dataclasses.dataclass(eq=False, repr=False)
class _Nonlinearity:
    nonlinearity: str = "tanh"


@dataclasses.dataclass(eq=False, repr=False)
class LayerArguments(_Sizes, SequenceArguments):
    """The arguments that `RNN`, `LSTM` and `GRU` share."""

    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    bidirectional: bool = False

    @property
    def layer(self) -> Stack:
        """The layer of the core that the arguments stand for."""
        return build_stack(self._cell(), self.num_layers, self.dropout, self.bidirectional)

    def _cell(self) -> Cell:
        """The cell that reads the input."""
        raise NotImplementedError

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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the layer over a sequence, as PyTorch's `forward` does.

        Args:
          input: `(T, batch, input_size)`; `(batch, T, input_size)` with `batch_first`; or one
            sequence `(T, input_size)`.
          hx: initial state `(num_layers * num_directions, batch, size)`, for an LSTM a tuple
            `(h_0, c_0)` of two; without batch for one sequence. None means zeros.
          lengths: integers `(batch,)` in [0, T], in any order: valid steps from the start of each
            row. A row of length 0 gives zeros and keeps its initial state.
          mask: bool, the input's layout without features; True at valid steps, in any pattern.
          deterministic: True turns dropout off, False on. None: as `train()` and `eval()` set an
            NNX module; a Linen module that has dropout needs it here or in the constructor.
          rngs: of an NNX module: overrides where dropout draws from. A Linen module draws from
            its "dropout" stream.

        Returns:
          `(output, state)`: output in the input's layout with `num_directions * size` features,
          zero at padding; state as `hx`, taken at each row's last valid step.

        Raises:
          TypeError, ValueError: where PyTorch raises, and for `lengths` or `mask` that do not fit.
        """


def _level_of_user() -> int:
    """How far up from our caller's line the one is that makes the module."""
    level = 1
    while sys._getframe(level).f_globals["__name__"].partition(".")[0] in ("seqjax", "flax"):
        level += 1
    return level


@dataclasses.dataclass(eq=False, repr=False)
class RNNArguments(LayerArguments, _Nonlinearity, _Sizes):
    """The arguments of `RNN`; this order of bases puts `nonlinearity` where PyTorch has it."""

    def _check(self) -> None:
        check_nonlinearity(self.nonlinearity)  # PyTorch looks at it first.
        super()._check()

    def _cell(self) -> Cell:
        return cells.RNNCell(self.input_size, self.hidden_size, self.bias, self.nonlinearity)


@dataclasses.dataclass(eq=False, repr=False)
class LSTMArguments(LayerArguments):
    """The arguments of `LSTM`."""

    proj_size: int = 0

    def _cell(self) -> Cell:
        return cells.LSTMCell(self.input_size, self.hidden_size, self.bias, self.proj_size)


class GRUArguments(LayerArguments):
    """The arguments of `GRU`."""

    def _cell(self) -> Cell:
        return cells.GRUCell(self.input_size, self.hidden_size, self.bias)


@dataclasses.dataclass(eq=False, repr=False)
class CellArguments(ModuleArguments):
    """The arguments that `RNNCell`, `LSTMCell` and `GRUCell` share."""

    input_size: int
    hidden_size: int
    bias: bool = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
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


@dataclasses.dataclass(eq=False, repr=False)
class RNNCellArguments(_Nonlinearity, CellArguments):
    """The arguments of `RNNCell`."""

    @property
    def layer(self) -> cells.RNNCell:
        return cells.RNNCell(self.input_size, self.hidden_size, self.bias, self.nonlinearity)


class LSTMCellArguments(CellArguments):
    """The arguments of `LSTMCell`."""

    @property
    def layer(self) -> cells.LSTMCell:
        return cells.LSTMCell(self.input_size, self.hidden_size, self.bias)


class GRUCellArguments(CellArguments):
    """The arguments of `GRUCell`."""

    @property
    def layer(self) -> cells.GRUCell:
        return cells.GRUCell(self.input_size, self.hidden_size, self.bias)
