"""Parameters that a layer draws itself, and those that initializers of the user's draw instead."""

import functools
import inspect
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from seqjax.cells.base import Layer
from seqjax.cells.checks import abstract_params
from seqjax.parameter_names import params_to_dict

WEIGHTS = {
    "kernel_init": ("w_ih",),
    "recurrent_kernel_init": ("w_hh", "w_hr"),
    "bias_init": ("b_ih", "b_hh"),
}
"""Which parameters the initializer of a name draws, in every cell that has them."""
_INITIALIZER_OF = {weight: name for name, weights in WEIGHTS.items() for weight in weights}


def check_initializers(layer: Layer, initializers: Mapping[str, object]) -> None:
    """Raises for what is no initializer, and for one that finds nothing to draw."""
    for name, initializer in initializers.items():
        if not callable(initializer):
            raise TypeError(
                f"{name} should be an initializer (key, shape, dtype) -> array, as in "
                f"jax.nn.initializers, got: {type(initializer).__name__}"
            )
    if not initializers:
        return
    paths = [path for path, _ in jax.tree.leaves_with_path(params_to_dict(abstract_params(layer)))]
    names = {path[-1].key for path in paths}
    for name in initializers:
        if names.isdisjoint(WEIGHTS[name]):
            raise ValueError(
                f"{name} draws {' and '.join(WEIGHTS[name])}, but the layer has no such "
                f"parameters, only: {', '.join(sorted(names))}"
            )


def draw(
    layer: Layer,
    key: jax.Array,
    dtype: DTypeLike,
    initializers: Mapping[str, Callable[..., Any]],
    in_box: Callable[..., Any],
) -> dict[str, Any]:
    """`layer.init`'s parameters by name, those of `initializers` drawn by them.

    What is drawn for one parameter depends on the key and the parameter's names alone.

    Args:
      layer: the layer.
      key: draws all.
      dtype: the dtype of the parameters.
      initializers: by the names in `WEIGHTS`. They give arrays, or boxes of Flax's around them.
      in_box: applies a function to what is in boxes of one kind, and boxes what it gives.
    """
    params = params_to_dict(layer.init(key, dtype))
    return _redraw(params, key, initializers, in_box) if initializers else params


def _redraw(
    params: dict[str, Any],
    key: jax.Array,
    initializers: Mapping[str, Callable[..., Any]],
    in_box: Callable[..., Any],
) -> dict[str, Any]:
    drawn = dict(params)
    for name, value in params.items():
        own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        argument = _INITIALIZER_OF.get(name, "")
        if isinstance(value, dict):
            drawn[name] = _redraw(value, own_key, initializers, in_box)
        elif argument in initializers:
            gates = _number_of_gates(params, name)
            draw_weight = functools.partial(_draw_weight, f"{argument}, which draws {name},")
            drawn[name] = draw_weight(initializers[argument], own_key, value, gates, in_box)
    return drawn


def _number_of_gates(params: Mapping[str, Any], name: str) -> int:
    """How many gates a cell's parameter holds side by side, each of hidden_size columns."""
    of_hidden_size = params.get("w_hr", params.get("w_hh"))
    if name == "w_hr" or of_hidden_size is None:
        return 1
    gates, rest = divmod(params[name].shape[-1], of_hidden_size.shape[0])
    return 1 if rest else gates


def _draw_weight(
    which: str,
    initializer: Callable[..., Any],
    key: jax.Array,
    value: jax.Array,
    gates: int,
    in_box: Callable[..., Any],
) -> Any:
    """An array in place of `value`, in the initializer's box if it gives one.

    How a matrix is drawn depends on its rows and columns, so each gate is drawn apart. A bias is
    drawn as one, and its initializer may say what number of gates it is for.
    """
    expected = getattr(inspect.unwrap(initializer), "gates", gates)
    if gates != expected:
        raise ValueError(f"{which} is for a layer of {expected} gates, but it has {gates}")
    pieces = gates if value.ndim > 1 else 1
    shape = (*value.shape[:-1], value.shape[-1] // pieces)
    keys = jax.random.split(key, pieces)

    def join(*arrays: Any) -> jax.Array:
        for array in arrays:
            _check_drawn(which, array, shape, value.dtype)
        return jnp.concatenate(arrays, axis=-1)

    return in_box(join, *(initializer(piece_key, shape, value.dtype) for piece_key in keys))


def _check_drawn(which: str, array: Any, shape: tuple[int, ...], dtype: Any) -> None:
    """Raises unless an initializer gave what it was asked for."""
    is_array = hasattr(array, "shape") and hasattr(array, "dtype")
    if is_array and (array.shape, array.dtype) == (shape, dtype):
        return
    got = f"{array.dtype} {array.shape}" if is_array else type(array).__name__
    if callable(array):
        got += ": some of JAX's initializers are made by a call, as orthogonal()"
    raise ValueError(f"{which} should give an array {dtype} {shape}, got: {got}")
