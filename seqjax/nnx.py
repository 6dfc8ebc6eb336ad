"""PyTorch's recurrent layers as Flax NNX modules.

They own parameters and compute nothing themselves: the functional core does. Parameter paths are
those of `seqjax.linen`, for example `layers_0/forward/w_ih`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from seqjax import cells, torch_shape
from seqjax.cells.base import Carry, Layer, Params, check_layer, check_type
from seqjax.cells.rnn import check_nonlinearity
from seqjax.interop.torch import load_params, params_to_torch, torch_dtype
from seqjax.layers import Stack
from seqjax.parameter_names import params_from_dict, params_to_dict


class _Parameters(nnx.Module):
    """The parameters of one layer of the core, as `nnx.Param`s under their names."""

    def __init__(
        self, layer: Layer, dtype: DTypeLike | None, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.layer = layer
        self.dtype = dtype
        self.param_dtype = param_dtype
        for name, tree in params_to_dict(layer.init(rngs.params(), param_dtype)).items():
            if hasattr(type(self), name) or name in vars(self):
                raise ValueError(
                    f"the layer has a parameter {name!r}, but {type(self).__name__} has an "
                    "attribute of that name: call the parameter something else"
                )
            setattr(self, name, nnx.data(jax.tree.map(nnx.Param, tree)))

    @property
    def params(self) -> Params:
        """The parameters as the core takes them: `seqjax.scan(module.layer, module.params, xs)`."""
        return jax.tree.map(lambda param: param[...], self._variables(), is_leaf=_is_variable)

    def _variables(self) -> Any:
        return params_from_dict(self.layer, vars(self))


class _TorchWeights(_Parameters):
    """PyTorch's weights in and out, for the modules that PyTorch has."""

    def torch_state_dict(self) -> dict[str, np.ndarray]:
        """The weights as `torch.nn.Module.load_state_dict` takes them after `torch.from_numpy`.

        Returns:
          NumPy arrays by PyTorch's names, in its order and layout. bfloat16, which NumPy lacks,
          comes as float32 without loss.
        """
        return params_to_torch(self.params)

    def load_torch_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Sets every weight from a PyTorch state dict, cast to the module's own dtype.

        Args:
          state_dict: arrays or tensors with exactly PyTorch's names and shapes for this module.

        Raises:
          ValueError: entries are missing, unexpected or misshapen; nothing is changed then.
        """
        params = load_params(type(self).__name__, self.params, state_dict)
        jax.tree.map(_assign, self._variables(), params, is_leaf=_is_variable)

    @classmethod
    def from_torch(cls, torch_module: Any, *, rngs: nnx.Rngs | None = None) -> Self:
        """A module with the configuration, weights, dtype and training mode of PyTorch's.

        Args:
          torch_module: the `torch.nn` module of the same name.
          rngs: where dropout draws from; None means `nnx.Rngs(0)`.

        Raises:
          TypeError: it is another kind of module.
        """
        torch_shape.torch_kind(torch_module, [cls.__name__])
        state_dict = torch_module.state_dict()
        module = cls(
            **torch_shape.torch_arguments(torch_module, cls),
            param_dtype=torch_dtype(state_dict),
            rngs=nnx.Rngs(0) if rngs is None else rngs,
        )
        module.load_torch_state_dict(state_dict)
        module.set_attributes(deterministic=not torch_module.training, raise_if_not_found=False)
        return module


class _OverSequences(_Parameters):
    """What modules that run over whole sequences have besides parameters."""

    def __init__(
        self,
        layer: Layer,
        *,
        batch_first: bool,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        implementation: str | None,
        remat: bool,
        rngs: nnx.Rngs,
    ) -> None:
        self.batch_first = batch_first
        self.implementation = implementation
        self.remat = remat
        self.deterministic = False
        # Held only where something is drawn, so that no key lands among the saved state otherwise.
        self.rngs = nnx.data(rngs["dropout"].fork() if layer.draws_dropout else None)
        super().__init__(layer, dtype, param_dtype, rngs)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Sets the mode of a view that `nnx.view` makes.

        Args:
          deterministic: True turns dropout off.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def _options(
        self, deterministic: bool | None, rngs: nnx.Rngs | nnx.RngStream | jax.Array | None
    ) -> dict[str, Any]:
        return {
            "batch_first": self.batch_first,
            "dtype": self.dtype,
            "implementation": self.implementation,
            "remat": self.remat,
            "key": self._dropout_key(deterministic, rngs),
        }

    def _dropout_key(
        self, deterministic: bool | None, rngs: nnx.Rngs | nnx.RngStream | jax.Array | None
    ) -> jax.Array | None:
        if deterministic is None:
            deterministic = self.deterministic
        if deterministic or not self.layer.draws_dropout:
            return None
        match self.rngs if rngs is None else rngs:
            case nnx.Rngs() as streams:
                return streams.dropout()
            case nnx.RngStream() as stream:
                return stream()
            case jax.Array() as key:
                return key
            case other:
                raise TypeError(
                    "rngs should be an nnx.Rngs, nnx.RngStream or a key, "
                    f"got: {type(other).__name__}"
                )


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
      rngs: draws the weights ("params") and dropout ("dropout").

    >>> from flax import nnx
    >>> import jax.numpy as jnp, seqjax, seqjax.nnx
    >>> layer = seqjax.Stack([seqjax.GRUCell(3, 8), seqjax.LSTMCell(8, 5)])
    >>> recurrent = seqjax.nnx.Recurrent(layer, rngs=nnx.Rngs(0))
    >>> output, carry = recurrent(jnp.ones((7, 2, 3)))
    >>> output.shape, carry[0].shape, carry[1].c.shape
    ((7, 2, 5), (2, 8), (2, 5))
    """

    def __init__(
        self,
        layer: Layer,
        *,
        batch_first: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        implementation: str | None = None,
        remat: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        check_layer("layer", layer)
        check_type("batch_first", batch_first, bool)
        super().__init__(
            layer,
            batch_first=batch_first,
            dtype=dtype,
            param_dtype=param_dtype,
            implementation=implementation,
            remat=remat,
            rngs=rngs,
        )

    def __call__(
        self,
        input: ArrayLike,
        carry: Carry | None = None,
        *,
        lengths: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
    ) -> tuple[jax.Array, Carry]:
        """Runs the layer over a sequence.

        Args:
          input: `(T, *batch, input_size)`, or `(*batch, T, input_size)` with `batch_first`.
          carry: initial state, as from `layer.initial_carry`; None means zeros.
          lengths: integers `(*batch,)`: valid steps from the start of each row.
          mask: bool, the input's layout without features; True at valid steps.
          deterministic: overrides the mode set by `train()` and `eval()`.
          rngs: overrides where dropout draws from.

        Returns:
          `(output, carry)`: outputs in the input's layout, zero at padding, and the final state.
        """
        return torch_shape.apply_recurrent(
            type(self).__name__, self.layer, self.params, input, carry,
            lengths=lengths, mask=mask, **self._options(deterministic, rngs),
        )  # fmt: skip


class _TorchLayer(_OverSequences, _TorchWeights):
    """`RNN`, `LSTM` and `GRU`: their attributes and their call."""

    layer: Stack

    def __init__(
        self,
        make_cell: Callable[[int], cells.Cell],
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        **options: Any,
    ) -> None:
        torch_shape.check_arguments(
            input_size=input_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
        )
        layer = torch_shape.build_stack(make_cell, input_size, num_layers, dropout, bidirectional)
        super().__init__(layer, batch_first=batch_first, **options)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.dropout = layer.dropout
        self.bidirectional = bidirectional

    def __call__(
        self,
        input: ArrayLike,
        hx: Any = None,
        *,
        lengths: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
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
          deterministic: overrides the mode set by `train()` and `eval()`.
          rngs: overrides where dropout draws from.

        Returns:
          `(output, state)`: output in the input's layout with `num_directions * size` features,
          zero at padding; state as `hx`, taken at each row's last valid step.

        Raises:
          TypeError, ValueError: where PyTorch raises, and for `lengths` or `mask` that do not fit.
        """
        return torch_shape.apply_stack(
            type(self).__name__, self.layer, self.params, input, hx,
            lengths=lengths, mask=mask, **self._options(deterministic, rngs),
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
      rngs: draws the weights ("params") and dropout ("dropout").

    Raises:
      TypeError, ValueError: where PyTorch raises.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, seqjax.nnx
    >>> lstm = seqjax.nnx.LSTM(10, 20, num_layers=2, batch_first=True, rngs=nnx.Rngs(0))
    >>> output, (h_n, c_n) = lstm(jnp.ones((3, 5, 10)), lengths=jnp.array([5, 2, 0]))
    >>> output.shape, h_n.shape
    ((3, 5, 20), (2, 3, 20))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        implementation: str | None = None,
        remat: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(
            lambda size: cells.LSTMCell(size, hidden_size, bias, proj_size),
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            dtype=dtype,
            param_dtype=param_dtype,
            implementation=implementation,
            remat=remat,
            rngs=rngs,
        )
        self.proj_size = proj_size


class GRU(_TorchLayer):
    """`torch.nn.GRU`.

    Equation: `seqjax.GRUCell`. Source:
    https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html

    Args:
      Those of `LSTM`, without `proj_size`.

    Raises:
      TypeError, ValueError: where PyTorch raises.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, seqjax.nnx
    >>> gru = seqjax.nnx.GRU(10, 20, num_layers=2, batch_first=True, rngs=nnx.Rngs(0))
    >>> output, h_n = gru(jnp.ones((3, 5, 10)), lengths=jnp.array([5, 2, 0]))
    >>> output.shape, h_n.shape
    ((3, 5, 20), (2, 3, 20))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        implementation: str | None = None,
        remat: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(
            lambda size: cells.GRUCell(size, hidden_size, bias),
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            dtype=dtype,
            param_dtype=param_dtype,
            implementation=implementation,
            remat=remat,
            rngs=rngs,
        )


class RNN(_TorchLayer):
    """`torch.nn.RNN`, tanh or relu.

    Equation: `seqjax.RNNCell`. Source:
    https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html

    Args:
      Those of `LSTM`, without `proj_size`, and in fourth place
      nonlinearity: "tanh" or "relu".

    Raises:
      TypeError, ValueError: where PyTorch raises.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, seqjax.nnx
    >>> rnn = seqjax.nnx.RNN(10, 20, num_layers=2, batch_first=True, rngs=nnx.Rngs(0))
    >>> output, h_n = rnn(jnp.ones((3, 5, 10)), lengths=jnp.array([5, 2, 0]))
    >>> output.shape, h_n.shape
    ((3, 5, 20), (2, 3, 20))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        implementation: str | None = None,
        remat: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        check_nonlinearity(nonlinearity)  # PyTorch looks at it first.
        super().__init__(
            lambda size: cells.RNNCell(size, hidden_size, bias, nonlinearity),
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            dtype=dtype,
            param_dtype=param_dtype,
            implementation=implementation,
            remat=remat,
            rngs=rngs,
        )
        self.nonlinearity = nonlinearity


class _TorchCell(_TorchWeights):
    """`RNNCell`, `LSTMCell` and `GRUCell`: their attributes and their call."""

    layer: Any  # A cell, with its sizes.

    def __init__(self, layer: Any, **options: Any) -> None:
        super().__init__(layer, **options)
        self.input_size = layer.input_size
        self.hidden_size = layer.hidden_size
        self.bias = layer.bias

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
            type(self).__name__, self.layer, self.params, input, hx, dtype=self.dtype
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
      rngs: draws the weights ("params").

    Raises:
      TypeError, ValueError: where PyTorch raises, and for sizes below 1.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, seqjax.nnx
    >>> cell = seqjax.nnx.LSTMCell(10, 20, rngs=nnx.Rngs(0))
    >>> h, c = cell(jnp.ones((3, 10)))
    >>> h.shape
    (3, 20)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        cell = cells.LSTMCell(input_size, hidden_size, bias)
        super().__init__(cell, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


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
      rngs: draws the weights ("params").

    Raises:
      TypeError, ValueError: where PyTorch raises, and for sizes below 1.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, seqjax.nnx
    >>> cell = seqjax.nnx.GRUCell(10, 20, rngs=nnx.Rngs(0))
    >>> h = cell(jnp.ones((3, 10)))
    >>> h.shape
    (3, 20)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        cell = cells.GRUCell(input_size, hidden_size, bias)
        super().__init__(cell, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


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
      rngs: draws the weights ("params").

    Raises:
      TypeError, ValueError: where PyTorch raises, and for sizes below 1.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, seqjax.nnx
    >>> cell = seqjax.nnx.RNNCell(10, 20, rngs=nnx.Rngs(0))
    >>> h = cell(jnp.ones((3, 10)))
    >>> h.shape
    (3, 20)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        cell = cells.RNNCell(input_size, hidden_size, bias, nonlinearity)
        super().__init__(cell, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.nonlinearity = nonlinearity


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _assign(variable: nnx.Param[Any], value: jax.Array) -> None:
    variable[...] = value
