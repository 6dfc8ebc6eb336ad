"""PyTorch's state dicts to and from parameters. Nothing here imports torch.

PyTorch stores `weight_*` as (gates * hidden, features), one entry for each layer and direction;
seqjax stores the transpose, ready to multiply. Gate orders and both biases are the same.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from seqjax.cells.base import Params
from seqjax.cells.gru import GRUParams
from seqjax.cells.lstm import LSTMParams
from seqjax.cells.rnn import RNNParams
from seqjax.interop.state_dicts import ENTRY, advice, entries_under, one_dtype, quoted, to_arrays
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


def params_from_torch(
    state_dict: Mapping[str, Any], dtype: DTypeLike | None = None, *, prefix: str = ""
) -> Params:
    """The parameters in a PyTorch state dict of an RNN, LSTM, GRU or one of their cells.

    Which of them it is, is read off the names and shapes: entries `weight_ih`, … give one cell's
    parameters; `weight_ih_l0`, … give those of a `Stack` with one entry a layer.

    Args:
      state_dict: PyTorch's names to arrays or tensors, of nothing but the recurrent layer.
      dtype: dtype of the parameters; None keeps the arrays', which must then have one.
      prefix: where a whole model's state dict has the layer, for example `"encoder.rnn."`, with or
        without the last dot; nothing else is read.

    Returns:
      `RNNParams`, `LSTMParams` or `GRUParams`, or a tuple with, for each layer, one of these or
      `BidirectionalParams` of two.

    Raises:
      TypeError: it is no state dict.
      ValueError: entries are missing, unexpected or misshapen, or hold no numbers; the message
        names them.

    >>> import numpy as np
    >>> cell = {"weight_ih": np.ones((15, 3)), "weight_hh": np.ones((15, 5))}
    >>> params = params_from_torch(cell, dtype="float32")
    >>> type(params).__name__, params.w_ih.shape, params.b_ih
    ('GRUParams', (3, 15), None)
    """
    values = entries_under(prefix, state_dict)
    if unexpected := [name for name in values if ENTRY.fullmatch(name) is None]:
        problem = f"Unexpected key(s) in state_dict: {quoted(unexpected)}."
        raise ValueError(" ".join([problem, *advice(prefix, state_dict)]))
    arrays = to_arrays(values)
    params = _params_from_arrays(arrays, dtype)
    if dtype is None:
        one_dtype(arrays)
    return params


def _params_from_arrays(arrays: Mapping[str, np.ndarray], dtype: DTypeLike | None) -> Params:
    entries: dict[tuple[int | None, bool], dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        if match := ENTRY.fullmatch(name):
            layer = None if match["layer"] is None else int(match["layer"])
            cell = entries.setdefault((layer, bool(match["reverse"])), {})
            cell[_FIELDS[match["name"]]] = array
    if not entries:
        raise ValueError("state_dict is empty: expected weight_ih, weight_hh, …")
    if (None, False) in entries:
        if len(entries) > 1:
            raise ValueError(
                "state_dict mixes a cell's names (weight_ih) with a layer's (weight_ih_l0): "
                f"got {quoted(arrays)}"
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


def load_params(
    name: str, params: Params, state_dict: Mapping[str, Any], prefix: str = ""
) -> Params:
    """Parameters like `params` in structure, shapes, dtype and devices, with a state dict's values.

    Args:
      name: what they are loaded into, for the message.
      params: parameters that `params_to_torch` takes.
      state_dict, prefix: as for `params_from_torch`.

    Raises:
      TypeError: it is no state dict.
      ValueError: naming every entry that is missing, unexpected or misshapen.
    """
    # Of them only structure, shapes, dtype and devices count: they may be abstract.
    expected = params_to_torch(jax.tree.map(lambda p: np.empty(p.shape, p.dtype), params))
    values = entries_under(prefix, state_dict)
    problems = []
    if missing := expected.keys() - values.keys():
        problems.append(f"Missing key(s) in state_dict: {quoted(sorted(missing))}.")
    if unexpected := values.keys() - expected.keys():
        problems.append(f"Unexpected key(s) in state_dict: {quoted(sorted(unexpected))}.")
    if problems:
        problems += advice(prefix, state_dict)
    arrays = to_arrays({key: values[key] for key in expected if key in values})
    for key in arrays:
        if arrays[key].shape != expected[key].shape:
            problems.append(
                f"size mismatch for {key}: got shape {arrays[key].shape}, "
                f"expected {expected[key].shape}."
            )
    if problems:
        raise ValueError(f"Error(s) in loading state_dict for {name}:\n\t" + "\n\t".join(problems))
    loaded = _params_from_arrays(arrays, jax.tree.leaves(params)[0].dtype)
    return jax.tree.map(_put_where, params, loaded)


def _put_where(old: Any, new: jax.Array) -> jax.Array:
    """The new array on the devices of the old one, if that was put there and is no NumPy array."""
    return jax.device_put(new, old.sharding) if getattr(old, "committed", False) else new


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
        raise ValueError(f"Missing key(s) in state_dict: {quoted(missing)}.")

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


def _not_in_torch(params: Any) -> str:
    return (
        "PyTorch has only cells, and stacks of cells or of bidirectional pairs of cells: "
        f"got parameters of type {type(params).__name__}"
    )
