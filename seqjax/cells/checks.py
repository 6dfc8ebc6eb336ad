"""What a layer takes, as the layer itself says it, and whether what it is given is that.

Only structures, shapes and dtypes are looked at: under `jax.jit` nothing of it is left.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

if TYPE_CHECKING:
    from seqjax.cells.base import Carry, Layer, Params

# What modules, `scan` and `step` ask of a layer at every call is found once, or computed in one
# call of all arrays: outside `jax.jit`, it would take longer than a small layer.


@functools.lru_cache
def abstract_params(layer: Layer) -> Params:
    """`layer.init`'s parameters without their values. Only their structure and shapes count."""
    return jax.eval_shape(lambda: layer.init(jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def initial_carry(layer: Layer, batch_shape: tuple[int, ...], dtype: DTypeLike) -> Carry:
    """`layer.initial_carry(batch_shape, dtype)`."""
    return layer.initial_carry(batch_shape, dtype)


def abstract_carry(
    layer: Layer, batch_shape: tuple[int, ...] = (), dtype: DTypeLike = jnp.float32
) -> Carry:
    """`initial_carry` without the values. Only its structure, shapes and dtypes count."""
    x64: bool = jax.config.jax_enable_x64  # type: ignore[attr-defined]
    return _abstract_carry(layer, batch_shape, jnp.dtype(dtype), x64)


@functools.lru_cache
def _abstract_carry(
    layer: Layer, batch_shape: tuple[int, ...], dtype: jnp.dtype, x64: bool
) -> Carry:
    del x64  # Dtypes that the layer chooses by itself follow it.
    return initial_carry.eval_shape(layer, batch_shape, dtype)  # type: ignore[no-untyped-call]


def check_step(
    layer: Layer, params: Params, carry: Carry, x: ArrayLike
) -> tuple[Params, Carry, jax.Array]:
    """What `layer.step` takes, made of what it is given: see `check_input` and `check_carry`."""
    x = as_array("x", x)
    if x.ndim < 1:
        raise ValueError("x should have at least 1 dimension (*batch, features), got shape ()")
    params = check_input("x", layer, params, x)
    return params, check_carry(layer, carry, x.shape[:-1], x.dtype), x


def check_input(name: str, layer: Layer, params: Params, x: jax.Array) -> Params:
    """The parameters, as `check_params` gives them, for an input that messages call `name`.

    Raises:
      TypeError: the input is not floating, or the parameters have another structure or dtype.
      ValueError: the number of features is wrong, or a parameter's shape.
    """
    if x.shape[-1] != layer.input_size:
        raise ValueError(
            f"{name}.shape[-1] must be equal to input_size. Expected {layer.input_size}, "
            f"got {x.shape[-1]}"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} should have a floating dtype, got: {x.dtype}")
    params = check_params(layer, params)
    for leaf in jax.tree.leaves(params):
        if leaf.dtype != x.dtype:
            raise TypeError(
                f"{name} and params should have one dtype, got: {x.dtype} and {leaf.dtype}. Cast "
                f"one of them, for example jax.tree.map(lambda p: p.astype({name}.dtype), params)"
            )
    return params


def check_params(layer: Layer, params: Params) -> Params:
    """The parameters, in the layer's own containers where only their names are the same.

    Checkpoints restored without a target are nested dicts and lists: what counts is that there is
    an array of each name, of its shape, and no other. A layer whose `init` cannot be traced, since
    it needs numbers or its parameters come from elsewhere, is given whatever there is.

    Raises:
      TypeError: arrays are missing, or there are others.
      ValueError: one has another shape.
    """
    expected = _structure_and_shapes(layer)
    if expected is None:
        return params
    leaves, structure = jax.tree.flatten(params)
    if expected == (structure, [getattr(leaf, "shape", None) for leaf in leaves]):
        return params
    own = jax.tree.leaves_with_path(abstract_params(layer))
    # What has a shape is an array to a layer, though `nnx.Param` is a container to JAX.
    given = jax.tree.leaves_with_path(params, is_leaf=lambda node: hasattr(node, "shape"))
    want, got = ({_path_name(path): leaf for path, leaf in paths} for paths in (own, given))
    if want.keys() != got.keys():
        differences = {
            "missing": [name for name in want if name not in got],
            "unexpected": [name for name in got if name not in want],
        }
        raise TypeError(
            f"params should be those of the {type(layer).__name__}, as layer.init gives them, got: "
            + "; ".join(
                f"{what} {', '.join(names)}" for what, names in differences.items() if names
            )
        )
    for name, leaf in want.items():
        if not hasattr(got[name], "shape"):
            raise TypeError(f"params {name}: expected an array, got: {type(got[name]).__name__}")
        if got[name].shape != leaf.shape:
            raise ValueError(f"params {name}: expected shape {leaf.shape}, got {got[name].shape}")
    if [path for path, _ in given] == [path for path, _ in own]:
        return params  # The layer finds them.
    return jax.tree.unflatten(expected[0], [got[name] for name in want])


@functools.lru_cache
def _structure_and_shapes(layer: Layer) -> tuple[Any, list[tuple[int, ...]]] | None:
    """Of the parameters; None: `layer.init` does not say."""
    try:
        leaves, structure = jax.tree.flatten(abstract_params(layer))
    except Exception:  # Whatever a function that cannot be traced raises.
        return None
    return structure, [leaf.shape for leaf in leaves]


def check_carry(
    layer: Layer, carry: Carry, batch_shape: tuple[int, ...], dtype: DTypeLike
) -> Carry:
    """The carry as arrays.

    A layer whose `initial_carry` raises, since its state comes from elsewhere, is given what there
    is.

    Raises:
      TypeError: its structure or a dtype is not that of `layer.initial_carry(batch_shape, dtype)`.
      ValueError: a shape is not.
    """
    leaves, structure = jax.tree.flatten(carry)
    try:
        expected = abstract_carry(layer, batch_shape, dtype)
    except Exception:
        return jax.tree.map(functools.partial(as_array, "carry"), carry)
    expected_leaves, expected_structure = jax.tree.flatten(expected)
    if structure != expected_structure:  # type: ignore[operator]
        raise TypeError(
            f"carry should have the structure {expected_structure}, got: {structure}. "
            "layer.initial_carry(batch_shape, dtype) makes one"
        )
    leaves = [as_array("carry", leaf) for leaf in leaves]
    for index, (got, want) in enumerate(zip(leaves, expected_leaves, strict=True)):
        if got.shape != want.shape or got.dtype != want.dtype:
            path, _ = jax.tree.leaves_with_path(expected)[index]
            name = "carry" + jax.tree_util.keystr(path)
            if got.shape != want.shape:
                raise ValueError(f"{name}: expected shape {want.shape}, got {got.shape}")
            raise TypeError(f"{name}: expected dtype {want.dtype}, got {got.dtype}")
    return jax.tree.unflatten(structure, leaves)


def as_array(name: str, value: ArrayLike) -> jax.Array:
    """`value`, which messages call `name`, as a JAX array.

    Raises:
      TypeError: it is PyTorch's PackedSequence, whose rows cannot be told from its steps.
    """
    if isinstance(value, jax.Array):  # To which `jnp.asarray` would do nothing, slowly.
        return value
    if type(value).__name__ == "PackedSequence":
        raise TypeError(
            f"{name} should be an array, got: PackedSequence. Pass the padded batch and lengths=, "
            "as torch.nn.utils.rnn.pad_packed_sequence gives them; seqjax.scan takes "
            "mask=seqjax.lengths_to_mask(lengths, T)"
        )
    return jnp.asarray(value)


def key_name(entry: Any) -> str:
    """The name of a parameter, or of what holds parameters, among its neighbours."""
    match entry:
        case jax.tree_util.GetAttrKey(name=name):
            return name
        case jax.tree_util.SequenceKey(idx=index):
            return f"layers_{index}"
        case _:
            return str(entry.key)


def _path_name(path: tuple[Any, ...]) -> str:
    return "/".join(map(key_name, path)) or "a lone array"
