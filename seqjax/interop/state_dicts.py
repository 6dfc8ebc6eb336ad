"""What stands in PyTorch's state dicts, as arrays."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from seqjax.cells.base import check_type

ENTRY = re.compile(
    r"(?P<name>weight_ih|weight_hh|bias_ih|bias_hh|weight_hr)"
    r"(?:_l(?P<layer>0|[1-9]\d*)(?P<reverse>_reverse)?)?"
)
# In a whole model's, and as PyTorch keeps what it makes a weight of.
_IN_MODEL = re.compile(
    rf"(?P<prefix>(?:.*?\.)??)(?P<parametrized>parametrizations\.)?{ENTRY.pattern}"
    r"(?P<part>_(?:g|v|u|orig|mask)|\..+)?"
)


def to_numpy(value: Any) -> np.ndarray:
    """A NumPy array from a tensor, a JAX array or anything array-like."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # Tensor.numpy() refuses it.
            return value.float().numpy().astype(jnp.bfloat16)
        return value.numpy()
    return np.asarray(value)


def entries_under(prefix: str, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The entries whose names start with a prefix, by what follows it.

    Raises:
      TypeError: it is no state dict.
      ValueError: it has no such entry.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            "state_dict should map PyTorch's names to arrays or tensors, as module.state_dict() "
            f"does, got: {type(state_dict).__name__}"
        )
    check_type("prefix", prefix, str)
    prefix = _with_dot(prefix)
    values = {
        name.removeprefix(prefix): value
        for name, value in state_dict.items()
        if name.startswith(prefix)
    }
    if prefix and not values:
        problem = f'state_dict has nothing under the prefix "{prefix}".'
        raise ValueError(" ".join([problem, *advice(prefix, state_dict)]))
    return values


def _with_dot(prefix: str) -> str:
    # PyTorch's own state_dict(prefix="rnn.") has the dot, its names of modules do not.
    return prefix + "." if prefix and not prefix.endswith(".") else prefix


def advice(prefix: str, state_dict: Mapping[str, Any]) -> list[str]:
    """What to do about a state dict that has other entries than were expected."""
    matches = [match for name in state_dict if (match := _IN_MODEL.fullmatch(name))]
    prefixes = sorted({match["prefix"] for match in matches})
    if _with_dot(prefix) not in prefixes:
        if not prefixes:
            return ["It holds no weights of an RNN, LSTM or GRU."] if prefix else []
        return [f"It holds recurrent layers under {quoted(prefixes)}: give one of these as prefix."]
    if any(match["parametrized"] or match["part"] for match in matches):
        return [
            "PyTorch makes weights of these (weight_norm, prune, parametrize): from_torch(module) "
            "takes what they make; or remove that from the module first."
        ]
    return []


def to_arrays(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Tensors and the like as arrays; raises ValueError for what is not of floating dtype."""
    arrays = {}
    for name, value in values.items():
        try:
            arrays[name] = to_numpy(value)
        except (TypeError, ValueError, RuntimeError) as error:  # On the meta device, quantised, …
            raise ValueError(
                f'"{name}" cannot be read ({error}): load or convert it in PyTorch first'
            ) from error
        if not jnp.issubdtype(arrays[name].dtype, jnp.floating):
            raise ValueError(f'"{name}" should be of floating dtype, got: {arrays[name].dtype}')
    return arrays


def one_dtype(arrays: Mapping[str, np.ndarray]) -> np.dtype:
    """The dtype that all arrays have; raises ValueError where there is another."""
    dtypes = {name: array.dtype for name, array in arrays.items()}
    if len(set(dtypes.values())) > 1:
        got = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise ValueError(
            f"weights should have one dtype, got: {got}. In PyTorch, module.to(dtype) converts "
            "them; params_from_torch takes dtype="
        )
    return next(iter(dtypes.values()))


def quoted(names: Iterable[str]) -> str:
    """Names for a message."""
    return ", ".join(f'"{name}"' for name in names)
