"""PyTorch's recurrent layers as Flax Linen modules.

They own parameters and compute nothing themselves: the functional core does. Parameter paths are
those of `seqjax.nnx`, for example `layers_0/forward/w_ih`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import Scope
from jax.typing import ArrayLike, DTypeLike

from seqjax import cells, torch_shape
from seqjax.cells.base import (
    Carry,
    Cell,
    Layer,
    Params,
    abstract_params,
    check_layer,
    check_type,
)
from seqjax.cells.rnn import check_nonlinearity
from seqjax.interop.torch import load_params, params_to_torch, torch_dtype
from seqjax.layers import Stack
from seqjax.parameter_names import params_from_dict, params_to_dict

Variables = Mapping[str, Any]


def torch_state_dict(module: "_TorchModule", variables: Variables) -> dict[str, np.ndarray]:
    """The weights as `torch.nn.Module.load_state_dict` takes them after `torch.from_numpy`.

    Args:
      module: a module of this file that PyTorch has too.
      variables: its variables, `{"params": ...}`; of a module inside another one,
        `{"params": variables["params"]["name of the module"]}`.

    Returns:
      NumPy arrays by PyTorch's names, in its order and layout. bfloat16, which NumPy lacks, comes
      as float32 without loss.

    >>> import jax, jax.numpy as jnp, seqjax.linen
    >>> gru = seqjax.linen.GRU(3, 5)
    >>> variables = gru.init(jax.random.key(0), jnp.ones((7, 2, 3)))
    >>> seqjax.linen.torch_state_dict(gru, variables)["weight_ih_l0"].shape
    (15, 3)
    """
    return params_to_torch(params_from_dict(module.layer, variables["params"]))


def load_torch_state_dict(
    module: "_TorchModule", variables: Variables, state_dict: Mapping[str, Any]
) -> dict[str, Any]:
    """New variables with every weight from a PyTorch state dict, cast to the dtype of the old.

    Args:
      module: a module of this file that PyTorch has too.
      variables: its variables, as for `torch_state_dict`.
      state_dict: arrays or tensors with exactly PyTorch's names and shapes for this module.

    Raises:
      ValueError: entries are missing, unexpected or misshapen.

    >>> import jax, jax.numpy as jnp, seqjax.linen
    >>> gru, x = seqjax.linen.GRU(3, 5), jnp.ones((7, 2, 3))
    >>> trained = gru.init(jax.random.key(0), x)
    >>> state_dict = seqjax.linen.torch_state_dict(gru, trained)
    >>> variables = gru.init(jax.random.key(1), x)
    >>> variables = seqjax.linen.load_torch_state_dict(gru, variables, state_dict)
    >>> bool((gru.apply(variables, x)[0] == gru.apply(trained, x)[0]).all())
    True
    """
    params = params_from_dict(module.layer, variables["params"])
    loaded = load_params(type(module).__name__, params, state_dict)
    return {**variables, "params": params_to_dict(loaded)}


def from_torch(torch_module: Any) -> tuple["_TorchModule", dict[str, Any]]:
    """A module with the configuration and dtype of PyTorch's, and variables with its weights.

    Args:
      torch_module: an RNN, LSTM, GRU or one of their cells from `torch.nn`.

    Returns:
      `(module, variables)`.

    Raises:
      TypeError: it is another kind of module.

    >>> import importlib.util, jax.numpy as jnp, seqjax.linen
    >>> if importlib.util.find_spec("torch"):
    ...     import torch
    ...
    ...     gru, variables = seqjax.linen.from_torch(torch.nn.GRU(3, 5))
    ...     output, h_n = gru.apply(variables, jnp.ones((7, 2, 3)))
    """
    kinds = {kind.__name__: kind for kind in (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell)}
    name = torch_shape.torch_kind(torch_module, kinds)
    state_dict = torch_module.state_dict()
    dtype = torch_dtype(state_dict)
    arguments = torch_shape.torch_arguments(torch_module, kinds[name])
    module = kinds[name](**arguments, param_dtype=dtype)
    params = load_params(name, module.layer.init(jax.random.key(0), dtype), state_dict)
    return module, {"params": params_to_dict(params)}


def _init(layer: Layer, key: jax.Array, dtype: DTypeLike) -> Params:
    # Flax traces the initializer of every parameter at every call, to compare shapes. What is drawn
    # is not compiled as one: that takes longer than array by array, many of which have one shape.
    if isinstance(key, jax.core.Tracer):
        return _traced_once(layer, key, dtype)
    return layer.init(key, dtype)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _traced_once(layer: Layer, key: jax.Array, dtype: DTypeLike) -> Params:
    return layer.init(key, dtype)


class _Parameters(nn.Module):
    """The parameters of one layer of the core, under their names."""

    dtype: DTypeLike | None = dataclasses.field(default=None, kw_only=True)
    param_dtype: DTypeLike = dataclasses.field(default=jnp.float32, kw_only=True)

    def __post_init__(self) -> None:
        # Where the arguments are given, not at the first call; and not in the copies that Flax
        # makes for each call, which would warn again.
        if not isinstance(self.parent, Scope):
            self._check()
        super().__post_init__()

    @nn.nowrap
    def _check(self) -> None:
        """Raises for arguments that do not make a layer."""
        _ = self.layer

    @nn.nowrap
    def _params(self) -> Params:
        layer = self.layer

        def initializer(name: str) -> Any:
            return lambda key: params_to_dict(_init(layer, key, self.param_dtype))[name]

        names = params_to_dict(abstract_params(layer))
        return params_from_dict(
            layer, {name: self.param(name, initializer(name)) for name in names}
        )


class _OverSequences(_Parameters):
    """What modules that run over whole sequences have besides parameters."""

    implementation: str | None = dataclasses.field(default=None, kw_only=True)
    remat: bool = dataclasses.field(default=False, kw_only=True)
    deterministic: bool | None = dataclasses.field(default=None, kw_only=True)

    @nn.nowrap
    def _options(self, deterministic: bool | None) -> dict[str, Any]:
        key = None
        if self.layer.draws_dropout and not nn.merge_param(
            "deterministic", self.deterministic, deterministic
        ):
            key = self.make_rng("dropout")
        return {
            "batch_first": self.batch_first,
            "dtype": self.dtype,
            "implementation": self.implementation,
            "remat": self.remat,
            "key": key,
        }


class Recurrent(_OverSequences):
    """Any layer of the core as a module: a cell, `Stack`, `Bidirectional` or one of your own.

    Args:
      layer: the layer.
      batch_first: inputs and outputs are `(*batch, T, features)`, not `(T, *batch, features)`.
      dtype: dtype to compute in, to which inputs and weights are cast; None: theirs, which must be
        the same.
      param_dtype: dtype of the weights.
      implementation: as in `seqjax.scan`.
      remat: as in `seqjax.scan`.
      deterministic: True turns dropout off; given here or in the call.

    >>> import jax, jax.numpy as jnp, seqjax, seqjax.linen
    >>> layer = seqjax.Stack([seqjax.GRUCell(3, 8), seqjax.LSTMCell(8, 5)])
    >>> recurrent = seqjax.linen.Recurrent(layer)
    >>> (output, carry), variables = recurrent.init_with_output(
    ...     jax.random.key(0), jnp.ones((7, 2, 3))
    ... )
    >>> output.shape, carry[0].shape, carry[1].c.shape
    ((7, 2, 5), (2, 8), (2, 5))
    """

    layer: Layer
    batch_first: bool = dataclasses.field(default=False, kw_only=True)

    @nn.nowrap
    def _check(self) -> None:
        check_layer("layer", self.layer)
        check_type("batch_first", self.batch_first, bool)

    @nn.compact
    def __call__(
        self,
        input: ArrayLike,
        carry: Carry | None = None,
        *,
        lengths: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        deterministic: bool | None = None,
    ) -> tuple[jax.Array, Carry]:
        """Runs the layer over a sequence.

        Args:
          input: `(T, *batch, input_size)`, or `(*batch, T, input_size)` with `batch_first`.
          carry: initial state, as from `layer.initial_carry`; None means zeros.
          lengths: integers `(*batch,)`: valid steps from the start of each row.
          mask: bool, the input's layout without features; True at valid steps.
          deterministic: True turns dropout off; False draws it from the "dropout" stream.

        Returns:
          `(output, carry)`: outputs in the input's layout, zero at padding, and the final state.
        """
        return torch_shape.apply_recurrent(
            type(self).__name__, self.layer, self._params(), input, carry,
            lengths=lengths, mask=mask, **self._options(deterministic),
        )  # fmt: skip


class _TorchModule(_Parameters):
    """A module that PyTorch has too: its arguments stand for a layer of the core."""


class _TorchLayer(_OverSequences, _TorchModule):
    """`RNN`, `LSTM` and `GRU`: their call."""

    @nn.nowrap
    def _check(self) -> None:
        torch_shape.check_arguments(
            input_size=self.input_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            bias=self.bias,
            batch_first=self.batch_first,
            dropout=self.dropout,
            bidirectional=self.bidirectional,
        )
        super()._check()

    @property
    def layer(self) -> Stack:
        """The layer of the core that this module stands for."""
        return torch_shape.build_stack(
            self._cell, self.input_size, self.num_layers, self.dropout, self.bidirectional
        )

    @nn.compact
    def __call__(
        self,
        input: ArrayLike,
        hx: Any = None,
        *,
        lengths: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        deterministic: bool | None = None,
    ) -> tuple[jax.Array, Any]:
        """Runs the layer over a sequence, as PyTorch's `forward` does.

        Args:
          input: `(T, batch, input_size)`; `(batch, T, input_size)` with `batch_first`; or one
            sequence `(T, input_size)`.
          hx: initial state `(num_layers * num_directions, batch, size)`, for an LSTM a tuple
            `(h_0, c_0)` of two; without batch for one sequence. None means zeros.
          lengths: integers `(batch,)` in [0, T], in any order: valid steps from the start of each
            row. A row of length 0 gives zeros and keeps its initial state.
          mask: bool, the input's layout without features; True at valid steps, in any pattern.
          deterministic: True turns dropout off; False draws it from the "dropout" stream. With
            dropout, it has to be given here or to the constructor.

        Returns:
          `(output, state)`: output in the input's layout with `num_directions * size` features,
          zero at padding; state as `hx`, taken at each row's last valid step.

        Raises:
          TypeError, ValueError: where PyTorch raises, and for `lengths` or `mask` that do not fit.
        """
        return torch_shape.apply_stack(
            type(self).__name__, self.layer, self._params(), input, hx,
            lengths=lengths, mask=mask, **self._options(deterministic),
        )  # fmt: skip


class LSTM(_TorchLayer):
    """`torch.nn.LSTM`, with its optional projection.

    Equation: `seqjax.LSTMCell`. Source:
    https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html

    Args:
      input_size: features of the input.
      hidden_size: features of the state.
      num_layers: layers one after the other.
      bias: whether there are biases.
      batch_first: input and output are `(batch, T, features)`; states never are.
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

    Raises:
      TypeError, ValueError: where PyTorch raises.

    >>> import jax, jax.numpy as jnp, seqjax.linen
    >>> lstm = seqjax.linen.LSTM(10, 20, num_layers=2, batch_first=True)
    >>> input = jnp.ones((3, 5, 10))
    >>> variables = lstm.init(jax.random.key(0), input)
    >>> output, (h_n, c_n) = lstm.apply(variables, input, lengths=jnp.array([5, 2, 0]))
    >>> output.shape, h_n.shape
    ((3, 5, 20), (2, 3, 20))
    """

    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    bidirectional: bool = False
    proj_size: int = 0

    @nn.nowrap
    def _cell(self, input_size: int) -> Cell:
        return cells.LSTMCell(input_size, self.hidden_size, self.bias, self.proj_size)


class GRU(_TorchLayer):
    """`torch.nn.GRU`.

    Equation: `seqjax.GRUCell`. Source:
    https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html

    Args:
      Those of `LSTM`, without `proj_size`.

    Raises:
      TypeError, ValueError: where PyTorch raises.

    >>> import jax, jax.numpy as jnp, seqjax.linen
    >>> gru = seqjax.linen.GRU(10, 20, num_layers=2, batch_first=True)
    >>> input = jnp.ones((3, 5, 10))
    >>> variables = gru.init(jax.random.key(0), input)
    >>> output, h_n = gru.apply(variables, input, lengths=jnp.array([5, 2, 0]))
    >>> output.shape, h_n.shape
    ((3, 5, 20), (2, 3, 20))
    """

    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    bidirectional: bool = False

    @nn.nowrap
    def _cell(self, input_size: int) -> Cell:
        return cells.GRUCell(input_size, self.hidden_size, self.bias)


class RNN(_TorchLayer):
    """`torch.nn.RNN`, tanh or relu.

    Equation: `seqjax.RNNCell`. Source:
    https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html

    Args:
      Those of `LSTM`, without `proj_size`, and in fourth place
      nonlinearity: "tanh" or "relu".

    Raises:
      TypeError, ValueError: where PyTorch raises.

    >>> import jax, jax.numpy as jnp, seqjax.linen
    >>> rnn = seqjax.linen.RNN(10, 20, num_layers=2, batch_first=True)
    >>> input = jnp.ones((3, 5, 10))
    >>> variables = rnn.init(jax.random.key(0), input)
    >>> output, h_n = rnn.apply(variables, input, lengths=jnp.array([5, 2, 0]))
    >>> output.shape, h_n.shape
    ((3, 5, 20), (2, 3, 20))
    """

    input_size: int
    hidden_size: int
    num_layers: int = 1
    nonlinearity: str = "tanh"
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    bidirectional: bool = False

    @nn.nowrap
    def _check(self) -> None:
        check_nonlinearity(self.nonlinearity)  # PyTorch looks at it first.
        super()._check()

    @nn.nowrap
    def _cell(self, input_size: int) -> Cell:
        return cells.RNNCell(input_size, self.hidden_size, self.bias, self.nonlinearity)


class _TorchCell(_TorchModule):
    """`RNNCell`, `LSTMCell` and `GRUCell`: their call."""

    @nn.compact
    def __call__(self, input: ArrayLike, hx: Any = None) -> Any:
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
        return torch_shape.apply_cell(
            type(self).__name__, self.layer, self._params(), input, hx, dtype=self.dtype
        )


class LSTMCell(_TorchCell):
    """`torch.nn.LSTMCell`: one step.

    Equation: `seqjax.LSTMCell`. Source:
    https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTMCell.html

    Args:
      input_size: features of the input.
      hidden_size: features of the state.
      bias: whether there are biases.
      dtype: dtype to compute in, to which input, state and weights are cast; None: theirs, which
        must be the same.
      param_dtype: dtype of the weights.

    Raises:
      TypeError, ValueError: where PyTorch raises, and for sizes below 1.

    >>> import jax, jax.numpy as jnp, seqjax.linen
    >>> cell = seqjax.linen.LSTMCell(10, 20)
    >>> (h, c), variables = cell.init_with_output(jax.random.key(0), jnp.ones((3, 10)))
    >>> h.shape
    (3, 20)
    """

    input_size: int
    hidden_size: int
    bias: bool = True

    @property
    def layer(self) -> Cell:
        """The cell of the core that this module stands for."""
        return cells.LSTMCell(self.input_size, self.hidden_size, self.bias)


class GRUCell(_TorchCell):
    """`torch.nn.GRUCell`: one step.

    Equation: `seqjax.GRUCell`. Source:
    https://docs.pytorch.org/docs/stable/generated/torch.nn.GRUCell.html

    Args:
      input_size: features of the input.
      hidden_size: features of the state.
      bias: whether there are biases.
      dtype: dtype to compute in, to which input, state and weights are cast; None: theirs, which
        must be the same.
      param_dtype: dtype of the weights.

    Raises:
      TypeError, ValueError: where PyTorch raises, and for sizes below 1.

    >>> import jax, jax.numpy as jnp, seqjax.linen
    >>> cell = seqjax.linen.GRUCell(10, 20)
    >>> h, variables = cell.init_with_output(jax.random.key(0), jnp.ones((3, 10)))
    >>> h.shape
    (3, 20)
    """

    input_size: int
    hidden_size: int
    bias: bool = True

    @property
    def layer(self) -> Cell:
        """The cell of the core that this module stands for."""
        return cells.GRUCell(self.input_size, self.hidden_size, self.bias)


class RNNCell(_TorchCell):
    """`torch.nn.RNNCell`: one step.

    Equation: `seqjax.RNNCell`. Source:
    https://docs.pytorch.org/docs/stable/generated/torch.nn.RNNCell.html

    Args:
      input_size: features of the input.
      hidden_size: features of the state.
      bias: whether there are biases.
      nonlinearity: "tanh" or "relu".
      dtype: dtype to compute in, to which input, state and weights are cast; None: theirs, which
        must be the same.
      param_dtype: dtype of the weights.

    Raises:
      TypeError, ValueError: where PyTorch raises, and for sizes below 1.

    >>> import jax, jax.numpy as jnp, seqjax.linen
    >>> cell = seqjax.linen.RNNCell(10, 20)
    >>> h, variables = cell.init_with_output(jax.random.key(0), jnp.ones((3, 10)))
    >>> h.shape
    (3, 20)
    """

    input_size: int
    hidden_size: int
    bias: bool = True
    nonlinearity: str = "tanh"

    @property
    def layer(self) -> Cell:
        """The cell of the core that this module stands for."""
        return cells.RNNCell(self.input_size, self.hidden_size, self.bias, self.nonlinearity)
