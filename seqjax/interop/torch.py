"""PyTorch's state dicts to and from parameters, and what its modules are. No torch is imported.

PyTorch stores `weight_*` as (gates * hidden, features), one entry for each layer and direction;
seqjax stores the transpose, ready to multiply. Gate orders and both biases are the same.
"""

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from seqjax.cells.base import Params
from seqjax.cells.gru import GRUParams
from seqjax.cells.lstm import LSTMParams
from seqjax.cells.rnn import RNNParams
from seqjax.layers import BidirectionalParams

__all__ = ["params_from_torch", "params_to_torch"]
__dir__ = __all__.copy  # What dir() and tab completion show.

CellParams = RNNParams | GRUParams | LSTMParams

# In PyTorch's own order of a state dict.
_TORCH_NAMES = {
    "w_ih": "weight_ih",
    "w_hh": "weight_hh",
    "b_ih": "bias_ih",
    "b_hh": "bias_hh",
    "w_hr": "weight_hr",
}
_FIELDS = {torch_name: field for field, torch_name in _TORCH_NAMES.items()}
_CELL_PARAMS_BY_GATES: dict[int, type[CellParams]] = {1: RNNParams, 3: GRUParams, 4: LSTMParams}
_ENTRY = re.compile(
    r"(?P<name>weight_ih|weight_hh|bias_ih|bias_hh|weight_hr)"
    r"(?:_l(?P<layer>0|[1-9]\d*)(?P<reverse>_reverse)?)?"
)


def params_to_torch(params: Params) -> dict[str, np.ndarray]:
    """A PyTorch state dict with the weights of a cell, or of a `Stack` in PyTorch's form.

    Args:
      params: parameters of an RNN, LSTM or GRU cell (entries `weight_ih`, …), or of a `Stack` of
        such cells or of `Bidirectional` pairs of them (`weight_ih_l0`, `weight_ih_l0_reverse`, …).

    Returns:
      NumPy arrays by PyTorch's names and in its order, ready for `load_state_dict` after
      `torch.from_numpy`. bfloat16, which NumPy lacks, comes as float32 without loss.

    Raises:
      TypeError: the parameters are of a form that PyTorch's layers do not have.

    >>> import jax, seqjax
    >>> params = seqjax.Stack([seqjax.GRUCell(3, 5)]).init(jax.random.key(0))
    >>> {name: array.shape for name, array in params_to_torch(params).items()}
    {'weight_ih_l0': (15, 3), 'weight_hh_l0': (15, 5), 'bias_ih_l0': (15,), 'bias_hh_l0': (15,)}
    """
    if isinstance(params, CellParams):
        return _cell_to_torch(params, "")
    if not isinstance(params, tuple) or hasattr(params, "_fields"):
        raise TypeError(_not_in_torch(params))
    state_dict = {}
    for index, layer in enumerate(params):
        directions = layer if isinstance(layer, BidirectionalParams) else (layer,)
        for cell_params, suffix in zip(directions, ("", "_reverse"), strict=False):
            state_dict.update(_cell_to_torch(cell_params, f"_l{index}{suffix}"))
    return state_dict


def params_from_torch(state_dict: Mapping[str, Any], dtype: DTypeLike | None = None) -> Params:
    """The parameters in a PyTorch state dict of an RNN, LSTM, GRU or one of their cells.

    Which of them it is, is read off the names and shapes: entries `weight_ih`, … give one cell's
    parameters; `weight_ih_l0`, … give those of a `Stack` with one entry a layer.

    Args:
      state_dict: PyTorch's names to arrays or tensors, of nothing but the recurrent layer.
      dtype: dtype of the parameters; None keeps that of each array.

    Returns:
      `RNNParams`, `LSTMParams` or `GRUParams`, or a tuple with, for each layer, one of these or
      `BidirectionalParams` of two.

    Raises:
      ValueError: entries are missing, unexpected or misshapen; the message names them.

    >>> import numpy as np
    >>> cell = {"weight_ih": np.ones((15, 3)), "weight_hh": np.ones((15, 5))}
    >>> params = params_from_torch(cell, dtype="float32")
    >>> type(params).__name__, params.w_ih.shape, params.b_ih
    ('GRUParams', (3, 15), None)
    """
    entries: dict[tuple[int | None, bool], dict[str, Any]] = {}
    unexpected = []
    for name, value in state_dict.items():
        match = _ENTRY.fullmatch(name)
        if match is None:
            unexpected.append(name)
            continue
        layer = None if match["layer"] is None else int(match["layer"])
        cell = entries.setdefault((layer, bool(match["reverse"])), {})
        cell[_FIELDS[match["name"]]] = to_numpy(value)
    if unexpected:
        raise ValueError(f"Unexpected key(s) in state_dict: {_quoted(unexpected)}.")
    if not entries:
        raise ValueError("state_dict is empty: expected weight_ih, weight_hh, …")
    if (None, False) in entries:
        if len(entries) > 1:
            raise ValueError(
                "state_dict mixes a cell's names (weight_ih) with a layer's (weight_ih_l0): "
                f"got {_quoted(state_dict)}"
            )
        return _cell_from_torch(entries[None, False], "", dtype)

    num_layers = 1 + max(layer for layer, _ in entries if layer is not None)
    bidirectional = any(reverse for _, reverse in entries)
    layers: list[Params] = []
    for index in range(num_layers):
        forward = _cell_from_torch(entries.get((index, False), {}), f"_l{index}", dtype)
        if not bidirectional:
            layers.append(forward)
            continue
        backward_entries = entries.get((index, True), {})
        backward = _cell_from_torch(backward_entries, f"_l{index}_reverse", dtype)
        layers.append(BidirectionalParams(forward, backward))
    return tuple(layers)


def load_params(name: str, params: Params, state_dict: Mapping[str, Any]) -> Params:
    """Parameters like `params` in structure, shapes and dtype, with a state dict's values.

    Args:
      name: what they are loaded into, for the message.
      params: parameters that `params_to_torch` takes.
      state_dict: PyTorch's names to arrays or tensors.

    Raises:
      ValueError: naming every entry that is missing, unexpected or misshapen.
    """
    # Of them only structure, shapes and dtype count: they may be abstract.
    expected = params_to_torch(jax.tree.map(lambda p: np.empty(p.shape, p.dtype), params))
    arrays = {key: to_numpy(value) for key, value in state_dict.items()}
    problems = []
    if missing := expected.keys() - arrays.keys():
        problems.append(f"Missing key(s) in state_dict: {_quoted(sorted(missing))}.")
    if unexpected := arrays.keys() - expected.keys():
        problems.append(f"Unexpected key(s) in state_dict: {_quoted(sorted(unexpected))}.")
    for key in expected.keys() & arrays.keys():
        if arrays[key].shape != expected[key].shape:
            problems.append(
                f"size mismatch for {key}: got shape {arrays[key].shape}, "
                f"expected {expected[key].shape}."
            )
    if problems:
        raise ValueError(f"Error(s) in loading state_dict for {name}:\n\t" + "\n\t".join(problems))
    return params_from_torch(arrays, jax.tree.leaves(params)[0].dtype)


def torch_kind(torch_module: Any, kinds: Iterable[str]) -> str:
    """Which of the `torch.nn` classes named in `kinds` a module is an instance of.

    Raises:
      TypeError: none of them.
    """
    bases = {
        base.__name__
        for base in type(torch_module).__mro__
        if base.__module__.partition(".")[0] == "torch"
    }
    for kind in kinds:
        if kind in bases:
            return kind
    expected = " or ".join(f"torch.nn.{kind}" for kind in kinds)
    raise TypeError(f"expected a {expected}, got: {type(torch_module).__name__}")


def torch_arguments(torch_module: Any, kind: type) -> dict[str, Any]:
    """What to call `kind` with so that it has the configuration and dtype of a PyTorch module.

    The positional arguments of our constructors are attributes of PyTorch's modules.
    """
    parameters = inspect.signature(kind.__init__).parameters.values()  # type: ignore[misc]
    arguments = {
        parameter.name: getattr(torch_module, parameter.name)
        for parameter in parameters
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and parameter.name not in ("self", "parent", "name")  # Flax's own, in linen.
    }
    weight = next(iter(torch_module.state_dict().values()))
    return arguments | {"param_dtype": to_numpy(weight).dtype}


def to_numpy(value: Any) -> np.ndarray:
    """A NumPy array from a tensor, a JAX array or anything array-like."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # Tensor.numpy() refuses it.
            return value.float().numpy().astype(jnp.bfloat16)
        return value.numpy()
    return np.asarray(value)


def _cell_to_torch(params: Any, suffix: str) -> dict[str, np.ndarray]:
    if not isinstance(params, CellParams):
        raise TypeError(_not_in_torch(params))
    state_dict = {}
    for field, torch_name in _TORCH_NAMES.items():
        value = getattr(params, field, None)
        if isinstance(value, jax.ShapeDtypeStruct):
            raise ValueError(
                f"there are no weights yet, but shapes alone: got {value} for {torch_name + suffix}"
            )
        if value is not None:
            array = np.asarray(value)
            if array.dtype == jnp.bfloat16:
                array = array.astype(np.float32)
            # A copy, so that what PyTorch does in place never writes into a JAX buffer.
            state_dict[torch_name + suffix] = np.array(array.T, order="C")
    return state_dict


def _cell_from_torch(
    entries: Mapping[str, np.ndarray], suffix: str, dtype: DTypeLike | None
) -> CellParams:
    required = ["w_ih", "w_hh"]
    if "b_ih" in entries or "b_hh" in entries:
        required += ["b_ih", "b_hh"]
    missing = [_TORCH_NAMES[field] + suffix for field in required if field not in entries]
    if missing:
        raise ValueError(f"Missing key(s) in state_dict: {_quoted(missing)}.")

    def describe() -> str:
        shapes = {_TORCH_NAMES[field] + suffix: array.shape for field, array in entries.items()}
        return f"these shapes fit no RNN, LSTM or GRU: {shapes}"

    for field, array in entries.items():
        if array.ndim != (1 if field.startswith("b") else 2):
            raise ValueError(describe())
    gate_rows, output_size = entries["w_hh"].shape
    hidden_size = entries["w_hr"].shape[1] if "w_hr" in entries else output_size
    gates, remainder = divmod(gate_rows, hidden_size) if hidden_size else (0, 1)
    expected = {
        "w_ih": (gate_rows, entries["w_ih"].shape[1]),
        "w_hh": (gate_rows, output_size),
        "b_ih": (gate_rows,),
        "b_hh": (gate_rows,),
        "w_hr": (output_size, hidden_size),
    }
    misshapen = any(array.shape != expected[field] for field, array in entries.items())
    kind = _CELL_PARAMS_BY_GATES.get(gates)
    if kind is None or remainder or misshapen or ("w_hr" in entries and kind is not LSTMParams):
        raise ValueError(describe())

    def to_jax(array: np.ndarray | None) -> jax.Array | None:
        # A copy: aliasing the tensor would let what torch does in place change these weights.
        return None if array is None else jnp.array(array.T, dtype or array.dtype)

    arrays: dict[str, Any] = {field: to_jax(entries.get(field)) for field in kind._fields}
    return kind(**arrays)


def _quoted(names: Any) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _not_in_torch(params: Any) -> str:
    return (
        "PyTorch has only cells, and stacks of cells or of bidirectional pairs of cells: "
        f"got parameters of type {type(params).__name__}"
    )
