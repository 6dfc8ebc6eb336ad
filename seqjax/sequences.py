"""Ragged sequences: lengths and masks, padding and unpadding."""

import functools
import operator
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import max_dim
from jax.export import is_symbolic_dim
from jax.typing import ArrayLike

__all__ = ["lengths_to_mask", "mask_to_lengths", "pad_sequence", "unpad_sequence"]
__dir__ = __all__.copy  # What dir() and tab completion show.


def lengths_to_mask(lengths: ArrayLike, max_length: int, *, batch_first: bool = False) -> jax.Array:
    """The mask of right-padded sequences: True at the first `lengths` steps of each row.

    Args:
      lengths: integers in [0, max_length], `(*batch,)`, sorted or not, traced or not.
      max_length: T, number of steps with the padding; may be symbolic, as in `jax.export`.
      batch_first: put the time axis last, `(*batch, T)`, instead of first.

    Returns:
      bool `(T, *batch)`, or `(*batch, T)`.

    Raises:
      TypeError: the lengths are not integers, or max_length is not an int.
      ValueError: a length is out of range (noticed where lengths and max_length are numbers, not
        traced or symbolic).

    >>> lengths_to_mask([1, 3], 3).astype(int).tolist()
    [[1, 1], [0, 1], [0, 1]]
    >>> lengths_to_mask([1, 3], 3, batch_first=True).astype(int).tolist()
    [[1, 0, 0], [1, 1, 1]]
    """
    if not is_symbolic_dim(max_length):
        max_length = operator.index(max_length)
    checked = integer_array(lengths)
    if isinstance(checked, np.ndarray):
        _check_range(checked, max_length)
    # Compared in int32: a length of a narrow or unsigned dtype neither overflows nor promotes.
    steps = jnp.expand_dims(jnp.arange(max_length, dtype=jnp.int32), tuple(range(checked.ndim)))
    mask = steps < checked.astype(jnp.int32)[..., None]
    return mask if batch_first else jnp.moveaxis(mask, -1, 0)


def mask_to_lengths(mask: ArrayLike, *, batch_first: bool = False) -> jax.Array:
    """The lengths of right-padded sequences: the inverse of `lengths_to_mask`.

    Args:
      mask: bool `(T, *batch)`, or `(*batch, T)` with `batch_first`; in each row True up to the
        length and False after it.
      batch_first: whether the time axis is last.

    Returns:
      int32 `(*batch,)`.

    Raises:
      TypeError: the mask is not bool.
      ValueError: the mask has no dimension, or a row has left padding or a gap, which no length
        can express (noticed where the mask is concrete, not traced).

    >>> mask_to_lengths(lengths_to_mask([1, 3, 0], 3)).tolist()
    [1, 3, 0]
    """
    mask = concrete_or_traced(mask)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask should be of dtype bool, got: {mask.dtype}")
    if mask.ndim == 0:
        raise ValueError("mask should have a time dimension, got shape ()")
    time_axis = -1 if batch_first else 0
    if isinstance(mask, np.ndarray):
        rows = np.moveaxis(mask, time_axis, 0)
        if (rows[1:] & ~rows[:-1]).any():
            raise ValueError(
                "mask has left padding or a gap, which lengths cannot express: "
                "pass the mask itself instead"
            )
    return jnp.sum(mask, axis=time_axis, dtype=jnp.int32)


def pad_sequence(
    sequences: Iterable[ArrayLike],
    batch_first: bool = False,
    padding_value: float = 0.0,
    padding_side: str = "right",
) -> jax.Array:
    """Stacks sequences of unequal length into one padded array.

    Args:
      sequences: arrays `(length, *features)` of one dtype and one feature shape, length 0 allowed.
      batch_first: give `(batch, T, *features)` instead of `(T, batch, *features)`.
      padding_value: what to put into the padding.
      padding_side: "right" or "left".

    Returns:
      The padded array, T being the longest length.

    Raises:
      TypeError: the argument is no iterable of arrays, or the dtypes differ.
      ValueError: no sequences, unequal feature shapes, or an unknown padding_side.

    Source: `torch.nn.utils.rnn.pad_sequence`, PyTorch 2.13.

    >>> import numpy as np
    >>> pad_sequence([np.array([4, 5]), np.array([1, 2, 3])], batch_first=True).tolist()
    [[4, 5, 0], [1, 2, 3]]
    """
    if not isinstance(sequences, Iterable):
        raise TypeError(
            "pad_sequence: Expected iterable for input sequences, "
            f"but got arg of type: {type(sequences)}"
        )
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side should be 'left' or 'right', got: {padding_side!r}")
    arrays, xp = _as_arrays(sequences)
    longest = functools.reduce(max_dim, (array.shape[0] for array in arrays))

    def pad(array: Any) -> Any:
        missing = longest - array.shape[0]
        amount = (missing, 0) if padding_side == "left" else (0, missing)
        widths = [amount, *[(0, 0)] * (array.ndim - 1)]
        return xp.pad(array, widths, constant_values=array.dtype.type(padding_value))

    return jnp.asarray(xp.stack([pad(array) for array in arrays], axis=0 if batch_first else 1))


def unpad_sequence(
    padded_sequences: ArrayLike, lengths: ArrayLike, batch_first: bool = False
) -> list[jax.Array]:
    """Cuts a right-padded array into its sequences: the inverse of `pad_sequence`.

    Args:
      padded_sequences: `(T, batch, *features)`, or `(batch, T, *features)` with `batch_first`.
      lengths: integers in [0, T], `(batch,)`; not traced, since they decide shapes.
      batch_first: whether the batch axis is first.

    Returns:
      One array `(length, *features)` a row.

    Raises:
      TypeError: the lengths are not integers, or are traced.
      ValueError: the array has fewer than 2 dimensions, or a length is out of range or missing.

    Source: `torch.nn.utils.rnn.unpad_sequence`, PyTorch 2.13.

    >>> padded = pad_sequence([jax.numpy.array([4, 5]), jax.numpy.array([1, 2, 3])])
    >>> [row.tolist() for row in unpad_sequence(padded, [2, 3])]
    [[4, 5], [1, 2, 3]]
    """
    padded = concrete_or_traced(padded_sequences)
    if padded.ndim < 2:
        raise ValueError(
            "padded_sequences should have at least 2 dimensions (T, batch, *features), "
            f"got shape {padded.shape}"
        )
    checked = integer_array(lengths)
    if not isinstance(checked, np.ndarray):
        raise TypeError(
            "unpad_sequence needs concrete lengths, got a traced array: lengths decide the shapes "
            "of the results. Call it outside jit, or keep the padded array and a mask"
        )
    if not batch_first:
        padded = padded.swapaxes(0, 1)
    if checked.shape != padded.shape[:1]:
        raise ValueError(
            f"Expected `len(lengths)` to be equal to batch_size, but got shape {checked.shape} "
            f"(batch_size={padded.shape[0]})"
        )
    _check_range(checked, padded.shape[1])
    rows = zip(padded, checked.tolist(), strict=True)
    return [jnp.asarray(row[:length]) for row, length in rows]


def concrete_or_traced(values: ArrayLike) -> np.ndarray | jax.Array:
    """A NumPy array whose values can be looked at, or a traced one whose values cannot."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values)):
        return jnp.asarray(values)
    return np.asarray(values)


def integer_array(lengths: ArrayLike) -> np.ndarray | jax.Array:
    array = concrete_or_traced(lengths)
    if array.size == 0:
        return array.astype(jnp.int32)  # To NumPy an empty list is one of floats.
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"lengths should be of an integer dtype, got: {array.dtype}")
    return array


def _check_range(lengths: np.ndarray, max_length: Any) -> None:
    """Whether a length is above a symbolic number of steps is not known."""
    most = np.inf if is_symbolic_dim(max_length) else max_length
    if lengths.size and (lengths.min() < 0 or lengths.max() > most):
        raise ValueError(
            f"lengths should be between 0 and the number of steps {max_length}, "
            f"got: min {lengths.min()} and max {lengths.max()}"
        )


def _as_arrays(sequences: Iterable[ArrayLike]) -> tuple[list[Any], ModuleType]:
    """The sequences as checked arrays, and the module to work in.

    NumPy unless a JAX array is among them: padding host data of many lengths on the device would
    compile a program for each length, while JAX arrays may be traced or differentiated.
    """
    items = list(sequences)
    if not items:
        raise ValueError("received an empty list of sequences")
    xp: ModuleType = jnp if any(isinstance(item, jax.Array) for item in items) else np
    arrays = [xp.asarray(item) for item in items]
    for index, array in enumerate(arrays):
        if array.ndim == 0:
            raise ValueError(f"sequences[{index}] should have a time dimension, got a scalar")
        if array.dtype != arrays[0].dtype:
            raise TypeError(
                f"sequences should have one dtype, got: {arrays[0].dtype} and {array.dtype}"
            )
        if array.shape[1:] != arrays[0].shape[1:]:
            raise ValueError(
                "sequences should have one feature shape, "
                f"got: {arrays[0].shape[1:]} and {array.shape[1:]}"
            )
    return arrays, xp
