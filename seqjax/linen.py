"""PyTorch's recurrent layers as Flax Linen modules.

They own parameters and compute nothing themselves: the functional core does. Parameter paths are
those of `seqjax.nnx`, for example `layers_0/forward/w_ih`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.core import Scope, unfreeze
from jax.typing import ArrayLike

from seqjax import cells
from seqjax import module_arguments as arguments
from seqjax.cells.base import Layer, Params
from seqjax.cells.checks import abstract_params, check_params
from seqjax.initial_parameters import WEIGHTS, draw
from seqjax.interop.torch import load_params, params_to_torch
from seqjax.interop.torch_modules import torch_arguments, torch_kind, weights_in_effect
from seqjax.module_arguments import CellT, LSTMState, LSTMStateLike, State, StateLike, documented
from seqjax.parameter_names import params_to_dict

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Recurrent",
    "from_torch",
    "load_torch_state_dict",
    "torch_state_dict",
]
__dir__ = __all__.copy  # What dir() and tab completion show.

Variables = Mapping[str, Any]

OF_LAYERS = {"forward", "backward", *itertools.chain(*WEIGHTS.values())}
"""Names of parameters, beside those of a Stack's layers. A layer without them refuses them."""


def torch_state_dict(module: _TorchModule, variables: Variables) -> dict[str, np.ndarray]:
    """The weights as `torch.nn.Module.load_state_dict` takes them after `torch.from_numpy`.

    Args:
      module: a module of this file that PyTorch has too.
      variables: its variables, `{"params": ...}`; of a module inside another one,
        `{"params": variables["params"]["name of the module"]}`.

    Returns:
      NumPy arrays by PyTorch's names, in its order and layout. bfloat16, which NumPy lacks, comes
      as float32 without loss.

    Raises:
      TypeError, ValueError: the variables are of another module.

    >>> import jax, jax.numpy as jnp, seqjax.linen
    >>> gru = seqjax.linen.GRU(3, 5)
    >>> variables = gru.init(jax.random.key(0), jnp.ones((7, 2, 3)))
    >>> seqjax.linen.torch_state_dict(gru, variables)["weight_ih_l0"].shape
    (15, 3)
    """
    return params_to_torch(_own_params(module.layer, variables["params"]))


def load_torch_state_dict(
    module: _TorchModule, variables: Variables, state_dict: Mapping[str, Any], *, prefix: str = ""
) -> dict[str, Any]:
    """New variables with every weight from a PyTorch state dict, cast to the dtype of the old.

    Args:
      module: a module of this file that PyTorch has too.
      variables: its variables, as for `torch_state_dict`.
      state_dict: arrays or tensors with exactly PyTorch's names and shapes for this module.
      prefix: where a whole model's state dict has the module, for example `"encoder.rnn."`, with or
        without the last dot; nothing else is read.

    Raises:
      TypeError: it is no state dict.
      ValueError: entries are missing, unexpected or misshapen.
      TypeError, ValueError: the variables are of another module.

    >>> import jax, jax.numpy as jnp, seqjax.linen
    >>> gru, x = seqjax.linen.GRU(3, 5), jnp.ones((7, 2, 3))
    >>> trained = gru.init(jax.random.key(0), x)
    >>> state_dict = seqjax.linen.torch_state_dict(gru, trained)
    >>> variables = gru.init(jax.random.key(1), x)
    >>> variables = seqjax.linen.load_torch_state_dict(gru, variables, state_dict)
    >>> bool((gru.apply(variables, x)[0] == gru.apply(trained, x)[0]).all())
    True
    """
    params = _own_params(module.layer, variables["params"])
    loaded = params_to_dict(load_params(type(module).__name__, params, state_dict, prefix))
    boxes = {name: unfreeze(variables["params"][name]) for name in loaded}
    own = nn.meta.replace_boxed(boxes, loaded)
    return {**variables, "params": {**variables["params"], **own}}


def from_torch(torch_module: Any) -> tuple[_TorchModule, dict[str, Any]]:
    """A module with the configuration and dtype of PyTorch's, and variables with its weights.

    The weights are those in effect: normed, pruned or parametrized ones as in eval mode.

    Args:
      torch_module: an RNN, LSTM, GRU or one of their cells from `torch.nn`.

    Returns:
      `(module, variables)`.

    Raises:
      TypeError: it is another kind of module, or quantised.
      ValueError: its weights are on the meta device, or of several dtypes.

    >>> import importlib.util, jax.numpy as jnp, seqjax.linen
    >>> if importlib.util.find_spec("torch"):
    ...     import torch
    ...
    ...     gru, variables = seqjax.linen.from_torch(torch.nn.GRU(3, 5))
    ...     output, h_n = gru.apply(variables, jnp.ones((7, 2, 3)))
    """
    kinds = {kind.__name__: kind for kind in (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell)}
    kind = kinds[torch_kind(torch_module, kinds)]
    module = kind(**torch_arguments(torch_module, kind))
    params = module.layer.init(jax.random.key(0), module.param_dtype)
    variables = {"params": params_to_dict(params)}
    return module, load_torch_state_dict(module, variables, weights_in_effect(torch_module))


def _own_params(layer: Layer, params: Mapping[str, Any]) -> Params:
    """The layer's parameters, out of Flax's boxes, of a scope that may be shared with others."""
    names = params_to_dict(abstract_params(layer)).keys() | OF_LAYERS
    own = {k: v for k, v in params.items() if k in names or k.startswith("layers_")}
    return check_params(layer, nn.meta.unbox(own))


class _Parameters(nn.Module, arguments.ModuleArguments):
    """The parameters of one layer of the core, under their names."""

    def __post_init__(self) -> None:
        # Where the arguments are given, not at the first call; and not in the copies that Flax
        # makes for each call, which would warn again.
        if not isinstance(self.parent, Scope):
            self._check()
        super().__post_init__()

    @nn.nowrap
    def _params(self) -> Params:
        layer = self.layer
        drawn: dict[str, Any] = {}

        def init(key: jax.Array, name: str) -> Any:
            # The first that is not there draws for all. Not compiled as one: that takes longer than
            # array by array, many of which have one shape.
            if not drawn:
                drawn.update(draw(layer, key, self.param_dtype, self._initializers, jax.tree.map))
            return drawn[name]

        for name in params_to_dict(abstract_params(layer)):
            # Of what is there, Flax would trace the initializer at every call, to compare shapes.
            if not self.has_variable("params", name):
                self.param(name, init, name)
        return _own_params(layer, self.variables.get("params", {}))


class _OverSequences(_Parameters, arguments.SequenceArguments, kw_only=True):
    """What modules that run over whole sequences have besides parameters."""

    deterministic: bool | None = None

    @nn.nowrap
    def _dropout_key(self, deterministic: bool | None) -> jax.Array | None:
        if not self.layer.draws_dropout or nn.merge_param(
            "deterministic", self.deterministic, deterministic
        ):
            return None
        return self.make_rng("dropout")


@documented
class Recurrent(arguments.RecurrentArguments, _OverSequences):
    """Any layer of the core as a module: a cell, `Stack`, `Bidirectional` or one of your own.

    >>> import jax, jax.numpy as jnp, seqjax, seqjax.linen
    >>> layer = seqjax.Stack([seqjax.GRUCell(3, 8), seqjax.LSTMCell(8, 5)])
    >>> recurrent = seqjax.linen.Recurrent(layer)
    >>> (output, carry), variables = recurrent.init_with_output(
    ...     jax.random.key(0), jnp.ones((7, 2, 3))
    ... )
    >>> output.shape, carry[0].shape, carry[1].c.shape
    ((7, 2, 5), (2, 8), (2, 5))
    """

    # Linen prepares for its work only the calls that it finds in its own classes.
    __call__ = nn.compact(arguments.RecurrentArguments.__call__)


class _TorchModule(_Parameters):
    """A module that PyTorch has too."""


class _TorchLayer(arguments.LayerArguments[StateLike, State], _OverSequences, _TorchModule):
    """`RNN`, `LSTM` and `GRU`.

    >>> import jax, jax.numpy as jnp, seqjax.linen
    >>> layer = seqjax.linen.LSTM(10, 20, num_layers=2, batch_first=True)
    >>> input = jnp.ones((3, 5, 10))
    >>> variables = layer.init(jax.random.key(0), input)
    >>> output, (h, c) = layer.apply(variables, input, lengths=jnp.array([5, 2, 0]))
    >>> output.shape, h.shape
    ((3, 5, 20), (2, 3, 20))
    """

    __call__ = nn.compact(arguments.LayerArguments.__call__)


@documented
class LSTM(_TorchLayer[LSTMStateLike, LSTMState], arguments.LSTMArguments):
    """`torch.nn.LSTM`, with its optional projection."""


@documented
class GRU(_TorchLayer[ArrayLike, jax.Array], arguments.GRUArguments):
    """`torch.nn.GRU`."""


@documented
class RNN(_TorchLayer[ArrayLike, jax.Array], arguments.RNNArguments):
    """`torch.nn.RNN`, tanh or relu."""


class _TorchCell(arguments.CellArguments[CellT, StateLike, State], _TorchModule):
    """`RNNCell`, `LSTMCell` and `GRUCell`.

    >>> import jax, jax.numpy as jnp, seqjax.linen
    >>> cell = seqjax.linen.LSTMCell(10, 20)
    >>> (h, c), variables = cell.init_with_output(jax.random.key(0), jnp.ones((3, 10)))
    >>> h.shape
    (3, 20)
    """

    __call__ = nn.compact(arguments.CellArguments.__call__)


@documented
class LSTMCell(_TorchCell[cells.LSTMCell, LSTMStateLike, LSTMState], arguments.LSTMCellArguments):
    """`torch.nn.LSTMCell`: one step."""


@documented
class GRUCell(_TorchCell[cells.GRUCell, ArrayLike, jax.Array], arguments.GRUCellArguments):
    """`torch.nn.GRUCell`: one step."""


@documented
class RNNCell(_TorchCell[cells.RNNCell, ArrayLike, jax.Array], arguments.RNNCellArguments):
    """`torch.nn.RNNCell`: one step."""
