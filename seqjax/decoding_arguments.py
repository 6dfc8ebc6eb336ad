"""What the arguments of `generate` and `beam_search` mean: checks, and where a carry's rows are."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from seqjax.sequences import concrete_or_traced, integer_array, lengths_to_mask

Axes = tuple[int | None, ...]
"""For each leaf of a carry, the axis of its rows, or None where it has none."""


def map_rows(function: Callable[..., jax.Array], axes: Axes, carry: Any, *others: Any) -> Any:
    """`function(axis, leaf, *other_leaves)` where a leaf has rows; `carry` itself elsewhere."""
    leaves, structure = jax.tree.flatten(carry)
    columns = zip(axes, leaves, *map(jax.tree.leaves, others), strict=True)
    mapped = [
        leaf if axis is None else function(axis, leaf, *rest) for axis, leaf, *rest in columns
    ]
    return jax.tree.unflatten(structure, mapped)


def check_prompt(
    prompt: ArrayLike, lengths: ArrayLike | None
) -> tuple[jax.Array, jax.Array | None]:
    """The prompt as an array, and the mask that its lengths stand for."""
    prompt = jnp.asarray(prompt)
    if not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise TypeError(f"prompt should hold integers, got dtype: {prompt.dtype}")
    if prompt.ndim != 2 or 0 in prompt.shape:
        raise ValueError(
            "prompt should have shape (length, batch) with at least one token a row, such as a "
            f"start-of-sequence token, got: {prompt.shape}"
        )
    if lengths is None:
        return prompt, None
    lengths = integer_array(lengths)
    if lengths.shape != prompt.shape[1:]:
        raise ValueError(
            f"prompt_lengths should have shape {prompt.shape[1:]}, got: {lengths.shape}"
        )
    if isinstance(lengths, np.ndarray) and lengths.min() < 1:
        raise ValueError(f"prompt_lengths should be at least 1, got: {lengths.min()}")
    return prompt, lengths_to_mask(lengths, prompt.shape[0])


def check_model(
    step: Callable[..., Any], carry: Any, prompt: jax.Array, carry_axis: Any
) -> tuple[Any, Axes, jax.ShapeDtypeStruct]:
    """The carry as arrays, the axes of its rows, and what the step's logits look like."""
    carry = jax.tree.map(jnp.asarray, carry)
    batch = prompt.shape[1]
    axes = _row_axes(carry, carry_axis, batch)
    result = jax.eval_shape(step, carry, prompt[0])
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise TypeError(f"step should return (carry, logits), got: {type(result).__name__}")
    new_carry, logits = result
    if not isinstance(logits, jax.ShapeDtypeStruct):
        raise TypeError(
            f"step should return (carry, logits), logits an array, got: {type(logits).__name__}"
        )
    if logits.ndim != 2 or logits.shape[0] != batch:
        raise ValueError(
            f"step should return logits of shape ({batch}, vocabulary), got: {logits.shape}"
        )
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"step should return logits of a floating dtype, got: {logits.dtype}")
    if logits.shape[1] - 1 > jnp.iinfo(prompt.dtype).max:  # type: ignore[no-untyped-call]
        raise TypeError(
            f"tokens have the prompt's dtype, and {prompt.dtype} does not hold all of the "
            f"{logits.shape[1]} that step returns logits of: pass the prompt in int32"
        )
    if _kinds(carry) != _kinds(new_carry):
        trees = [jax.tree.map(_kind, tree) for tree in (carry, new_carry)]
        raise TypeError(
            "step should return a carry of the same structure, shapes and dtypes as it got, "
            f"{trees[0]}, got: {trees[1]}"
        )
    return carry, axes, logits


def check_stop(stop_token: ArrayLike | None, prompt: jax.Array, vocabulary: int) -> Any:
    """Each row's stop token, or None."""
    if stop_token is None:
        return None
    stop, shape = concrete_or_traced(stop_token), prompt.shape[1:]
    if not jnp.issubdtype(stop.dtype, jnp.integer):
        raise TypeError(f"stop_token should be an integer, got dtype: {stop.dtype}")
    if stop.shape not in ((), shape):
        raise ValueError(f"stop_token should have shape () or {shape}, got {stop.shape}")
    if isinstance(stop, np.ndarray) and ((stop < 0) | (stop >= vocabulary)).any():
        raise ValueError(
            f"stop_token should be one of the {vocabulary} tokens that step returns logits of, "
            f"got: {stop_token}. With None, no token ends a row"
        )
    return jnp.broadcast_to(jnp.asarray(stop).astype(prompt.dtype), shape)


def check_numbers(
    name: str,
    numbers: ArrayLike,
    expected: str,
    are_fine: Callable[[np.ndarray], np.ndarray],
    *,
    batch: int,
    dtype: DTypeLike,
) -> Any:
    """Numbers for all rows or one each, that `are_fine` if not traced, as `(1 or batch, 1)`."""
    array = concrete_or_traced(numbers)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise TypeError(f"{name} should be a number, got: {numbers!r}")
    if array.shape not in ((), (batch,)):
        raise ValueError(f"{name} should have shape () or ({batch},), got: {array.shape}")
    if isinstance(array, np.ndarray) and not are_fine(array).all():
        raise ValueError(f"{name} should be {expected}, got: {numbers}")
    with np.errstate(over="ignore"):  # What is too large for the dtype is infinite.
        return array.astype(dtype).reshape(-1, 1)


def check_key(key: Any) -> None:
    """Raises TypeError unless it is one random key."""
    try:
        jax.eval_shape(lambda: jax.random.fold_in(key, 0))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"key should be a random key, as from jax.random.key(0), got: {key!r} ({error})"
        ) from None


def at_least(name: str, number: Any, least: int) -> int:
    """The number as an int, which it is, and no smaller than `least`."""
    try:
        index = operator.index(number)
    except TypeError:
        index = None
    if index is None or isinstance(number, bool):
        raise TypeError(f"{name} should be an int, got: {number!r}")
    if index < least:
        raise ValueError(f"{name} should be at least {least}, got: {number}")
    return index


def _row_axes(carry: Any, carry_axis: Any, batch: int) -> Axes:
    unsaid = isinstance(carry_axis, str) and carry_axis == "first"
    axes: list[Any] = []
    try:
        jax.tree.map(
            lambda axis, part: axes.extend([axis] * len(jax.tree.leaves(part))),
            0 if unsaid else carry_axis,
            carry,
            is_leaf=lambda axis: axis is None,
        )
    except ValueError as error:
        raise ValueError(
            f"carry_axis should be an int, None, or a tree of them with the structure of the "
            f"carry's outer part, as in_axes of jax.vmap, got: {carry_axis}. {error}"
        ) from None
    return tuple(
        _row_axis(f"carry{jax.tree_util.keystr(path)}", leaf.shape, axis, batch, unsaid)
        for (path, leaf), axis in zip(jax.tree.leaves_with_path(carry), axes, strict=True)
    )


def _row_axis(name: str, shape: tuple[int, ...], axis: Any, batch: int, unsaid: bool) -> int | None:
    if axis is None:
        return None
    if isinstance(axis, bool) or not isinstance(axis, int | np.integer):
        raise TypeError(f"carry_axis should be an int or None for {name}, got: {axis!r}")
    fitting = [index for index, size in enumerate(shape) if size == batch]
    where = axis + len(shape) if axis < 0 else int(axis)
    if where in fitting and (not unsaid or len(fitting) == 1):
        return where
    expected = f"{name} should have {batch} rows, as the prompt, on axis {axis}"
    if where in fitting:
        expected += " and on no other axis as many entries, unless carry_axis is given"
    raise ValueError(
        f"{expected}, got shape: {shape}, where the axes that fit are {fitting}. Give carry_axis: "
        "0 for the carry of seqjax's cells and layers, 1 for the states of seqjax.nnx.LSTM and "
        "the like, None where there are no rows, or a tree of these, one for each part of the carry"
    )


def _kinds(tree: Any) -> tuple[Any, list[Any]]:
    return jax.tree.structure(tree), [_kind(leaf) for leaf in jax.tree.leaves(tree)]


def _kind(leaf: Any) -> tuple[tuple[int, ...], str]:
    return leaf.shape, str(leaf.dtype)
