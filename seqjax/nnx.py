"""PyTorch's recurrent layers as Flax NNX modules.

They own parameters and compute nothing themselves: the functional core does. Parameter paths are
those of `seqjax.linen`, for example `layers_0/forward/w_ih`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self, TypeVar, dataclass_transform

import jax
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from seqjax import module_arguments as arguments
from seqjax.cells.base import Carry, Params
from seqjax.initial_parameters import draw
from seqjax.interop.torch import load_params, params_to_torch
from seqjax.interop.torch_modules import torch_arguments, torch_kind, weights_in_effect
from seqjax.module_arguments import LSTMState, LSTMStateLike, State, StateLike, documented
from seqjax.parameter_names import params_from_dict, params_to_dict

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell", "Recurrent"]
__dir__ = __all__.copy  # What dir() and tab completion show.

Draws = nnx.Rngs | nnx.RngStream | jax.Array
Module = TypeVar("Module", bound="_Parameters")


def _abstract(variable: nnx.Variable[Any]) -> bool:
    """Whether it has a shape and no value, as in a module from `nnx.eval_shape`."""
    return isinstance(variable.get_value(), jax.ShapeDtypeStruct)


@dataclass_transform(field_specifiers=(dataclasses.field,))
def _module(cls: type[Module]) -> type[Module]:
    """Completes a class that users make modules of."""
    module = documented(nnx.dataclass(eq=False)(cls))
    module.__init__.__annotations__["rngs"] = nnx.Rngs  # help() would speak of `InitVar`.
    return module


def _in_box(function: Callable[..., jax.Array], *boxes: Any) -> Any:
    """`function` of what `nnx.with_metadata` and its like have put into boxes, in such a box."""
    if not isinstance(boxes[0], nnx.VariableMetadata):
        return function(*boxes)
    return dataclasses.replace(boxes[0], raw_value=function(*(box.raw_value for box in boxes)))


@nnx.dataclass(eq=False)
class _Parameters(nnx.Module, arguments.ModuleArguments):
    """The parameters of one layer of the core, as `nnx.Param`s under their names."""

    rngs: dataclasses.InitVar[nnx.Rngs] = dataclasses.field(kw_only=True)

    def __post_init__(self, rngs: nnx.Rngs) -> None:
        self._check()
        if not isinstance(rngs, nnx.Rngs):
            raise TypeError(
                f"rngs should be an nnx.Rngs, such as nnx.Rngs(0), got: {type(rngs).__name__}"
            )
        initializers = self._initializers
        for name in initializers:  # Functions kept would make the graphs of equal modules differ.
            vars(self)[name] = None
        params = draw(self.layer, rngs.params(), self.param_dtype, initializers, _in_box)
        for name, tree in params.items():
            if hasattr(type(self), name) or name in type(self).__dataclass_fields__:
                raise ValueError(
                    f"the layer has a parameter {name!r}, but {type(self).__name__} has an "
                    "attribute of that name: call the parameter something else"
                )
            setattr(self, name, nnx.data(jax.tree.map(nnx.Param, tree)))

    if not TYPE_CHECKING:  # A checker that sees it takes any attribute for known.

        def __setattr__(self, name: str, value: Any) -> None:
            # An argument that changes acts from then on, unless the weights have been made for it.
            if name in vars(self) and name in {field.name for field in dataclasses.fields(self)}:
                changed = object.__new__(type(self))
                vars(changed).update(vars(self) | {name: value})
                changed._check()
                if changed._drawn() != self._drawn():
                    raise ValueError(
                        f"the module's weights are made for {name}={getattr(self, name)!r}: make "
                        f"another module with {name}={value!r}"
                    )
            super().__setattr__(name, value)

    def _drawn(self) -> tuple[Any, Params]:
        """By what the constructor draws, and of what shapes and dtypes."""
        key = jax.random.key(0)
        shapes = jax.eval_shape(lambda key: self.layer.init(key, self.param_dtype), key)
        return self._initializers, shapes

    @property
    def params(self) -> Params:
        """The parameters as the core takes them: `seqjax.scan(module.layer, module.params, xs)`.

        They are `jax.ShapeDtypeStruct`s in a module from `nnx.eval_shape`.
        """
        return params_from_dict(self.layer, vars(self), read=lambda variable: variable.get_value())

    def _params(self) -> Params:
        params = self.params
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
            raise ValueError(
                f"this {type(self).__name__} has no weights yet, but shapes alone, as of "
                "nnx.eval_shape: load weights before it is called"
            )
        return params

    @property
    def _compute_dtype(self) -> DTypeLike:
        # Weights may have been cast since they were made.
        leaves = jax.tree.leaves(self.params) if self.dtype is None else []
        return leaves[0].dtype if leaves else super()._compute_dtype


class _TorchWeights(_Parameters):
    """PyTorch's weights in and out, for the modules that PyTorch has."""

    def torch_state_dict(self) -> dict[str, np.ndarray]:
        """The weights as `torch.nn.Module.load_state_dict` takes them after `torch.from_numpy`.

        Returns:
          NumPy arrays by PyTorch's names, in its order and layout. bfloat16, which NumPy lacks,
          comes as float32 without loss.
        """
        return params_to_torch(self.params)

    def load_torch_state_dict(self, state_dict: Mapping[str, Any], *, prefix: str = "") -> None:
        """Sets every weight from a PyTorch state dict, cast to the module's own dtype.

        Args:
          state_dict: arrays or tensors with exactly PyTorch's names and shapes for this module.
          prefix: where a whole model's state dict has the module, for example `"encoder.rnn."`,
            with or without the last dot; nothing else is read.

        Raises:
          TypeError: it is no state dict.
          ValueError: entries are missing, unexpected or misshapen; nothing is changed then.
        """
        params = load_params(type(self).__name__, self.params, state_dict, prefix)
        nnx.update(self, params_to_dict(params))

    @classmethod
    def from_torch(cls, torch_module: Any, *, rngs: nnx.Rngs | None = None) -> Self:
        """A module with the configuration, weights, dtype and training mode of PyTorch's.

        The weights are those in effect: normed, pruned or parametrized ones as in eval mode.

        Args:
          torch_module: the `torch.nn` module of the same name.
          rngs: where dropout draws from; None means `nnx.Rngs(0)`.

        Raises:
          TypeError: it is another kind of module, or quantised.
          ValueError: its weights are on the meta device, or of several dtypes.
        """
        torch_kind(torch_module, [cls.__name__])
        draws = nnx.Rngs(0) if rngs is None else rngs
        module = cls(**torch_arguments(torch_module, cls), rngs=draws)
        module.load_torch_state_dict(weights_in_effect(torch_module))
        module.set_attributes(deterministic=not torch_module.training, raise_if_not_found=False)
        return module


class _OverSequences(_Parameters, arguments.SequenceArguments):
    """What modules that run over whole sequences have besides parameters."""

    rngs: nnx.RngStream | None  # What is kept of the argument.
    deterministic: bool = False

    def __post_init__(self, rngs: nnx.Rngs) -> None:
        super().__post_init__(rngs)
        self.deterministic = False
        # Held only where something is drawn, so that no key lands among the saved state otherwise.
        self.rngs = nnx.data(rngs["dropout"].fork() if self.layer.draws_dropout else None)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Sets the mode of a view that `nnx.view` makes.

        Args:
          deterministic: True turns dropout off.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def _dropout_key(
        self, deterministic: bool | None, rngs: Draws | None = None
    ) -> jax.Array | None:
        if deterministic is None:
            deterministic = self.deterministic
        if deterministic or not self.layer.draws_dropout:
            return None
        draws = self.rngs if rngs is None else rngs
        stream = draws.dropout if isinstance(draws, nnx.Rngs) else draws
        if stream is None or (isinstance(stream, nnx.RngStream) and _abstract(stream.key)):
            raise ValueError(
                f"this {type(self).__name__} has nothing to draw dropout from, since it was made "
                "without dropout or by nnx.eval_shape: give rngs in the call"
            )
        key = stream() if isinstance(stream, nnx.RngStream) else stream
        if not isinstance(key, jax.Array):
            raise TypeError(
                f"rngs should be an nnx.Rngs, nnx.RngStream or a key, got: {type(draws).__name__}"
            )
        return key


@_module
class Recurrent(arguments.RecurrentArguments, _OverSequences):
    """Any layer of the core as a module: a cell, `Stack`, `Bidirectional` or one of your own.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, seqjax, seqjax.nnx
    >>> layer = seqjax.Stack([seqjax.GRUCell(3, 8), seqjax.LSTMCell(8, 5)])
    >>> recurrent = seqjax.nnx.Recurrent(layer, rngs=nnx.Rngs(0))
    >>> output, carry = recurrent(jnp.ones((7, 2, 3)))
    >>> output.shape, carry[0].shape, carry[1].c.shape
    ((7, 2, 5), (2, 8), (2, 5))
    """

    def __call__(
        self,
        input: ArrayLike,
        carry: Carry | None = None,
        deterministic: bool | None = None,
        *,
        lengths: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        rngs: Draws | None = None,
    ) -> tuple[jax.Array, Carry]:
        return self._run(input, carry, deterministic, rngs, lengths=lengths, mask=mask)


class _TorchLayer(arguments.LayerArguments[StateLike, State], _OverSequences, _TorchWeights):
    """`RNN`, `LSTM` and `GRU`.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, seqjax.nnx
    >>> layer = seqjax.nnx.LSTM(10, 20, num_layers=2, batch_first=True, rngs=nnx.Rngs(0))
    >>> output, (h, c) = layer(jnp.ones((3, 5, 10)), lengths=jnp.array([5, 2, 0]))
    >>> output.shape, h.shape
    ((3, 5, 20), (2, 3, 20))
    """

    def __call__(
        self,
        input: ArrayLike,
        hx: StateLike | None = None,
        deterministic: bool | None = None,
        *,
        lengths: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        rngs: Draws | None = None,
    ) -> tuple[jax.Array, State]:
        return self._run(input, hx, deterministic, rngs, lengths=lengths, mask=mask)


@_module
class LSTM(_TorchLayer[LSTMStateLike, LSTMState], arguments.LSTMArguments):
    """`torch.nn.LSTM`, with its optional projection."""


@_module
class GRU(_TorchLayer[ArrayLike, jax.Array], arguments.GRUArguments):
    """`torch.nn.GRU`."""


@_module
class RNN(_TorchLayer[ArrayLike, jax.Array], arguments.RNNArguments):
    """`torch.nn.RNN`, tanh or relu."""


class _TorchCell(_TorchWeights):
    """`RNNCell`, `LSTMCell` and `GRUCell`.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, seqjax.nnx
    >>> cell = seqjax.nnx.LSTMCell(10, 20, rngs=nnx.Rngs(0))
    >>> (h, c) = cell(jnp.ones((3, 10)))
    >>> h.shape
    (3, 20)
    """


@_module
class LSTMCell(arguments.LSTMCellArguments, _TorchCell):
    """`torch.nn.LSTMCell`: one step."""


@_module
class GRUCell(arguments.GRUCellArguments, _TorchCell):
    """`torch.nn.GRUCell`: one step."""


@_module
class RNNCell(arguments.RNNCellArguments, _TorchCell):
    """`torch.nn.RNNCell`: one step."""
