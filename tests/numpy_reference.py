"""A slow reference: one row and one step at a time in NumPy, from PyTorch's equations alone."""

from typing import Any

import jax
import numpy as np

import seqjax


def run(
    layer: seqjax.Layer, params: Any, xs: np.ndarray, carry: Any, mask: np.ndarray | None = None
) -> tuple[Any, np.ndarray]:
    """The final carry and the outputs for `xs` of shape `(T, rows, features)`."""
    valid = np.ones(xs.shape[:2], bool) if mask is None else mask
    results = []
    for row in range(xs.shape[1]):
        row_carry = jax.tree.map(lambda leaf, row=row: leaf[row], carry)
        results.append(_run_row(layer, params, xs[:, row], row_carry, valid[:, row], False))
    carries, ys = zip(*results, strict=True)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *carries), np.stack(ys, axis=1)


def _run_row(
    layer: Any, params: Any, xs: np.ndarray, carry: Any, valid: np.ndarray, reverse: bool
) -> tuple[Any, np.ndarray]:
    if isinstance(layer, seqjax.Stack):
        carries = []
        for entry, entry_params, entry_carry in zip(layer.layers, params, carry, strict=True):
            entry_carry, xs = _run_row(entry, entry_params, xs, entry_carry, valid, reverse)
            carries.append(entry_carry)
        return tuple(carries), xs
    if isinstance(layer, seqjax.Bidirectional):
        forward, forward_ys = _run_row(
            layer.forward, params.forward, xs, carry.forward, valid, reverse
        )
        backward, backward_ys = _run_row(
            layer.backward, params.backward, xs, carry.backward, valid, not reverse
        )
        return seqjax.BidirectionalCarry(forward, backward), np.hstack([forward_ys, backward_ys])
    ys = np.zeros((len(xs), layer.output_size))
    times = [time for time in range(len(xs)) if valid[time]]
    for time in reversed(times) if reverse else times:
        carry, ys[time] = step(layer, params, carry, xs[time])
    return carry, ys


def step(cell: Any, params: Any, carry: Any, x: np.ndarray) -> tuple[Any, np.ndarray]:
    """One step of one row."""

    def sigmoid(value: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-value))

    def from_x(gate: int) -> np.ndarray:
        columns = np.s_[gate * cell.hidden_size : (gate + 1) * cell.hidden_size]
        return x @ params.w_ih[:, columns] + (params.b_ih[columns] if cell.bias else 0)

    def from_h(gate: int) -> np.ndarray:
        columns = np.s_[gate * cell.hidden_size : (gate + 1) * cell.hidden_size]
        return h @ params.w_hh[:, columns] + (params.b_hh[columns] if cell.bias else 0)

    if isinstance(cell, seqjax.RNNCell):
        h = carry
        total = from_x(0) + from_h(0)
        new_h = np.tanh(total) if cell.nonlinearity == "tanh" else np.maximum(total, 0)
        return new_h, new_h
    if isinstance(cell, seqjax.GRUCell):
        h = carry
        reset = sigmoid(from_x(0) + from_h(0))
        update = sigmoid(from_x(1) + from_h(1))
        candidate = np.tanh(from_x(2) + reset * from_h(2))
        new_h = (1 - update) * candidate + update * h
        return new_h, new_h
    h = carry.h
    in_gate = sigmoid(from_x(0) + from_h(0))
    forget_gate = sigmoid(from_x(1) + from_h(1))
    candidate = np.tanh(from_x(2) + from_h(2))
    out_gate = sigmoid(from_x(3) + from_h(3))
    new_c = forget_gate * carry.c + in_gate * candidate
    new_h = out_gate * np.tanh(new_c)
    if cell.proj_size:
        new_h = new_h @ params.w_hr
    return seqjax.LSTMCarry(new_h, new_c), new_h
