"""What the arguments of PyTorch's recurrent layers mean: checks, layouts, and the layer to run.

Everything that `seqjax.nnx` and `seqjax.linen` share. States are `(num_layers * num_directions,
batch, size)` with index `layer * num_directions + direction`, whatever `batch_first` says.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from seqjax.cells.base import Carry, Cell, Layer, Params
from seqjax.cells.checks import abstract_carry, as_array, initial_carry
from seqjax.layers import Bidirectional, BidirectionalCarry, Stack
from seqjax.recurrence import scan
from seqjax.sequences import lengths_to_mask


# Modules ask for it at every call, and what is kept of a layer is found faster for the same object.
@functools.lru_cache
def build_stack(cell: Any, num_layers: int, dropout: float, bidirectional: bool) -> Stack:
    """The layer of the core that PyTorch's arguments describe; `cell` reads the input."""
    layers: list[Layer] = []
    for _ in range(num_layers):
        if layers:
            cell = dataclasses.replace(cell, input_size=layers[-1].output_size)
        layers.append(Bidirectional(cell, cell) if bidirectional else cell)
    return Stack(layers, dropout=dropout)


def apply_recurrent(
    name: str,
    layer: Layer,
    params: Params,
    input: ArrayLike,
    carry: Carry | None,
    *,
    batch_first: bool,
    lengths: ArrayLike | None,
    mask: ArrayLike | None,
    key: jax.Array | None,
    dtype: DTypeLike | None,
    implementation: str | None,
    remat: bool,
) -> tuple[jax.Array, Carry]:
    """Runs any layer in PyTorch's order of arguments and results: `output, carry`.

    Args:
      name: class name, for messages.
      layer: the layer, and `params` its parameters.
      input: `(T, *batch, input_size)`, or `(*batch, T, input_size)` with `batch_first`.
      carry: initial state as `layer.initial_carry` gives it; None means zeros.
      batch_first: see `input`; for one sequence, `(T, input_size)`, it changes nothing.
      lengths: integers `(*batch,)`, the number of valid steps from the start of each row.
      mask: bool, the input's layout without features; at most one of `lengths` and `mask`.
      key: draws dropout; None means no dropout.
      dtype: dtype to compute in; None means the input's, which the parameters must then have.
      implementation, remat: as in `seqjax.scan`.
    """
    params, xs = _in_compute_dtype(name, params, as_array(f"{name}: input", input), dtype)
    if batch_first and xs.ndim > 1:
        xs = jnp.moveaxis(xs, -2, 0)
    time_major_mask = _time_major_mask(lengths, mask, xs.shape[:-1], batch_first)
    if carry is not None:
        carry = _cast_carry(name, layer, carry, xs, cast=dtype is not None)
    carry, output = scan(
        layer, params, xs, carry,
        mask=time_major_mask, key=key, implementation=implementation, remat=remat,
    )  # fmt: skip
    return (jnp.moveaxis(output, 0, -2) if batch_first else output), carry


def apply_stack(
    name: str,
    layer: Stack,
    params: Params,
    input: ArrayLike,
    hx: Any,
    *,
    batch_first: bool,
    **options: Any,
) -> tuple[jax.Array, Any]:
    """`torch.nn.LSTM.forward` and its siblings, for a layer from `build_stack`.

    Args:
      name: class name, for messages.
      layer: from `build_stack`, and `params` its parameters.
      input: `(T, batch, features)`, `(batch, T, features)` with `batch_first`, or `(T, features)`.
      hx: `h_0`, or `(h_0, c_0)` for an LSTM; None means zeros.
      batch_first: see `input`.
      options: the other arguments of `apply_recurrent`.

    Returns:
      `output, h_n` or `output, (h_n, c_n)`.
    """
    input = as_array(f"{name}: input", input)
    if input.ndim not in (2, 3):
        raise ValueError(f"{name}: Expected input to be 2D or 3D, got {input.ndim}D instead")
    time_axis = 1 if batch_first and input.ndim == 3 else 0
    batch_shape = input.shape[:-1][:time_axis] + input.shape[:-1][time_axis + 1 :]
    cell = _cells(layer)[0]
    if hx is not None:
        hx = _as_state(name, cell, hx)
        _check_state_rank(hx, input.ndim)
    if input.shape[-1] != layer.input_size:
        raise ValueError(
            "input.size(-1) must be equal to input_size. "
            f"Expected {layer.input_size}, got {input.shape[-1]}"
        )
    if hx is not None:
        _check_state_shape(cell, hx, len(_cells(layer)), batch_shape)
    if input.shape[time_axis] == 0:
        raise ValueError(
            f"Expected sequence length to be larger than 0 in RNN, got input shape {input.shape}"
        )
    carry = None if hx is None else _split_state(layer, hx)
    output, carry = apply_recurrent(
        name, layer, params, input, carry, batch_first=batch_first, **options
    )
    return output, _join_state(carry)


def apply_cell(
    name: str, cell: Cell, params: Params, input: ArrayLike, hx: Any, *, dtype: DTypeLike | None
) -> Any:
    """`torch.nn.LSTMCell.forward` and its siblings: the state after one step.

    Args:
      name: class name, for messages.
      cell: the cell, and `params` its parameters.
      input: `(batch, input_size)` or `(input_size,)`.
      hx: `h`, or `(h, c)` for an LSTM; None means zeros.
      dtype: as in `apply_recurrent`.
    """
    input = as_array(f"{name}: input", input)
    if input.ndim not in (1, 2):
        raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.ndim}D instead")
    params, x = _in_compute_dtype(name, params, input, dtype)
    if x.shape[-1] != cell.input_size:
        raise ValueError(
            f"input has inconsistent input_size: got {x.shape[-1]} expected {cell.input_size}"
        )
    if hx is None:
        carry = initial_carry(cell, x.shape[:-1], x.dtype)
    else:
        carry = _as_state(name, cell, hx)
        _check_cell_state(name, cell, carry, x.shape[:-1])
        carry = _cast_carry(name, cell, carry, x[None], cast=dtype is not None)
    carry, _ = _step(cell, params, carry, x)
    return _without_names(carry)


def zero_carry(layer: Layer, batch_shape: tuple[int, ...], dtype: DTypeLike) -> Carry:
    """What `apply_recurrent` starts from where it is given no carry."""
    if not isinstance(batch_shape, tuple):
        raise TypeError(
            "batch_shape should be a tuple, such as (4,) for 4 rows or () for one sequence, "
            f"got: {batch_shape!r}"
        )
    return initial_carry(layer, batch_shape, jnp.dtype(dtype))


def zero_state(name: str, layer: Layer, batch_shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """What `apply_stack` and `apply_cell` start from where `hx` is None, as they would take it."""
    carry = zero_carry(layer, batch_shape, dtype)
    if len(batch_shape) > 1:
        raise ValueError(f"{name}: batch_shape should be (batch,) or (), got: {batch_shape}")
    return _join_state(carry) if isinstance(layer, Stack) else _without_names(carry)


# Compiled for calls outside jit, as `scan` is.
@functools.partial(jax.jit, static_argnums=0)
def _step(cell: Cell, params: Params, carry: Carry, x: jax.Array) -> tuple[Carry, jax.Array]:
    return cell.step(params, carry, x)


def _in_compute_dtype(
    name: str, params: Params, x: jax.Array, dtype: DTypeLike | None
) -> tuple[Params, jax.Array]:
    if dtype is None:
        weight_dtype = next((leaf.dtype for leaf in jax.tree.leaves(params)), x.dtype)
        if x.dtype != weight_dtype:
            raise ValueError(
                f"{name}: input dtype ({x.dtype}) does not match weight dtype ({weight_dtype}). "
                f"Convert input: input.astype({str(weight_dtype)!r}), or set the module's dtype, "
                "to which input and weights are then cast"
            )
        return params, x
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name}: input should have a floating dtype, got: {x.dtype}")
    return jax.tree.map(lambda p: p.astype(dtype), params), x.astype(dtype)


def _time_major_mask(
    lengths: ArrayLike | None, mask: ArrayLike | None, shape: tuple[int, ...], batch_first: bool
) -> jax.Array | None:
    """The core's mask `(T, *batch)`, given `shape = (T, *batch)`, from what the user gave."""
    if lengths is not None and mask is not None:
        raise ValueError("got both lengths and mask: expected at most one of them")
    if lengths is not None:
        made = lengths_to_mask(lengths, shape[0])
        if made.shape != shape:
            raise ValueError(
                "lengths should have one entry a row: "
                f"expected shape {shape[1:]}, got {made.shape[1:]}"
            )
        return made
    if mask is not None:
        mask = jnp.asarray(mask)
        expected = shape[1:] + shape[:1] if batch_first else shape
        if mask.shape != expected:
            raise ValueError(
                "mask should have the input's layout without features: "
                f"expected shape {expected}, got {mask.shape}"
            )
        return jnp.moveaxis(mask, -1, 0) if batch_first else mask
    return None


def _cast_carry(name: str, layer: Layer, carry: Carry, xs: jax.Array, *, cast: bool) -> Carry:
    """Gives the carry the dtypes that the layer keeps.

    Without a compute dtype to cast to, a state in another dtype than the input's is a mistake; the
    LSTM's `c` may come in either of the input's dtype and the wider one that it is kept in.
    """
    template = abstract_carry(layer, xs.shape[1:-1], xs.dtype)
    if jax.tree.structure(carry) != jax.tree.structure(template):  # type: ignore[operator]
        return carry  # `scan` says what it should be.

    def convert(leaf: ArrayLike, want: jax.ShapeDtypeStruct) -> jax.Array:
        leaf = jnp.asarray(leaf)
        castable = cast and jnp.issubdtype(leaf.dtype, jnp.floating)
        if leaf.dtype not in (want.dtype, xs.dtype) and not castable:
            raise ValueError(
                f"{name}: state dtype ({leaf.dtype}) does not match input dtype ({xs.dtype})"
            )
        return leaf.astype(want.dtype)

    return jax.tree.map(convert, carry, template)


def _as_state(name: str, cell: Cell, hx: Any) -> Any:
    """`hx` as arrays in the structure of the cell's own carry."""
    states, structure = jax.tree.flatten(abstract_carry(cell))
    if len(states) == 1:
        if isinstance(hx, tuple | list):
            raise TypeError(f"{name}: hx should be an array h_0, got: {type(hx).__name__}")
        return jnp.asarray(hx)
    if not isinstance(hx, tuple | list) or len(hx) != 2 or any(state is None for state in hx):
        got = type(hx).__name__
        if isinstance(hx, tuple | list):
            got += f" of {len(hx)}: " + ", ".join(type(state).__name__ for state in hx)
        raise TypeError(f"{name}: hx should be a tuple of two arrays (h_0, c_0), got: {got}")
    return jax.tree.unflatten(structure, [jnp.asarray(state) for state in hx])


def _check_state_rank(hx: Any, rank: int) -> None:
    ranks = [state.ndim for state in jax.tree.leaves(hx)]
    if all(state_rank == rank for state_rank in ranks):
        return
    what = f"For {'batched 3-D' if rank == 3 else 'unbatched 2-D'} input"
    if len(ranks) == 1:
        raise ValueError(f"{what}, hx should also be {rank}-D but got {ranks[0]}-D tensor")
    raise ValueError(
        f"{what}, hx and cx should also be {rank}-D but got ({ranks[0]}-D, {ranks[1]}-D) tensors"
    )


def _check_state_shape(cell: Cell, hx: Any, count: int, batch_shape: tuple[int, ...]) -> None:
    states = jax.tree.leaves(hx)
    for index, (state, one) in enumerate(
        zip(states, _state_shapes(cell, batch_shape), strict=True)
    ):
        expected = (count, *one)
        if state.shape != expected:
            which = f"hidden[{index}]" if len(states) > 1 else "hidden"
            raise ValueError(f"Expected {which} size {expected}, got {list(state.shape)}")


def _check_cell_state(name: str, cell: Cell, hx: Any, batch_shape: tuple[int, ...]) -> None:
    states = jax.tree.leaves(hx)
    for index, (state, want) in enumerate(
        zip(states, _state_shapes(cell, batch_shape), strict=True)
    ):
        if state.ndim not in (1, 2):
            which = f"hx[{index}]" if len(states) > 1 else "hidden"
            raise ValueError(f"{name}: Expected {which} to be 1D or 2D, got {state.ndim}D instead")
        if state.ndim != len(want):
            raise ValueError(
                f"{name}: For {len(want)}-D input, hidden{index} should also be {len(want)}-D "
                f"but got {state.ndim}-D"
            )
        if state.shape[:-1] != want[:-1]:
            raise ValueError(
                f"Input batch size {want[0]} doesn't match hidden{index} batch size "
                f"{state.shape[0]}"
            )
        if state.shape != want:
            raise ValueError(
                f"hidden{index} has inconsistent hidden_size: got {state.shape[-1]}, "
                f"expected {want[-1]}"
            )


def _state_shapes(cell: Cell, batch_shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    state = abstract_carry(cell, batch_shape)
    return [leaf.shape for leaf in jax.tree.leaves(state)]


def _directions(entry: Any) -> tuple[Any, ...]:
    """A layer's one or two directions, whether of the layer itself, its parameters or its carry."""
    match entry:
        case Bidirectional(forward=forward, backward=backward):
            return forward, backward
        case BidirectionalCarry():
            return tuple(entry)
        case _:
            return (entry,)


def _cells(layer: Stack) -> list[Any]:
    return [cell for entry in layer.layers for cell in _directions(entry)]


@functools.partial(jax.jit, static_argnums=0)
def _split_state(layer: Stack, hx: Any) -> tuple[Carry, ...]:
    """PyTorch's stacked states, in the cells' own structure, as the carry of a Stack."""
    states = iter(jax.tree.map(lambda s, i=i: s[i], hx) for i in range(len(_cells(layer))))
    return tuple(
        BidirectionalCarry(next(states), next(states))
        if isinstance(entry, Bidirectional)
        else next(states)
        for entry in layer.layers
    )


@jax.jit
def _join_state(carry: tuple[Carry, ...]) -> Any:
    """The carry of a Stack as PyTorch's stacked states: the inverse of `_split_state`."""
    states = [state for entry in carry for state in _directions(entry)]
    return _without_names(jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))


def _without_names(state: Any) -> Any:
    """A plain tuple for an LSTM's named one, so that a state has one type going in and out."""
    return tuple(state) if isinstance(state, tuple) else state
