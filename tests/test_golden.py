"""Values and gradients against files that real PyTorch wrote; torch itself is not needed.

`golden/generate.py` says what is in the files and how to write them anew.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from golden import generate
from parity import (
    CELL_FORMS,
    LAYER_FORMS,
    Config,
    Data,
    Results,
    assert_close,
    assert_same,
    quick_compilation,
    run_seqjax,
    run_seqjax_forward,
)

FLOAT64_TOLERANCE = 1e-12
FLOAT32_TOLERANCE = 1e-5
RAGGED_RUNS = [run for run, lengths in generate.LENGTHS.items() if lengths is not None]
# As far as the forms differ, the other structures are parts of this one.
TWO_LAYERS_BIDIRECTIONAL = [f"{kind}_two_layers_bidirectional" for kind in generate.KINDS]
OUTSIDE_JIT = [
    *itertools.product(TWO_LAYERS_BIDIRECTIONAL, LAYER_FORMS),
    *zip([f"{kind}_two_layers" for kind in generate.KINDS], LAYER_FORMS, strict=False),
]


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation() -> Iterator[None]:
    with quick_compilation():
        yield


@functools.cache
def load(name: str) -> tuple[Config, dict[str, tuple[Data, Results]]]:
    return generate.unflatten(generate.load(name))


def assert_padding_has_no_gradient(data: Data, results: Results) -> None:
    """Exactly 0, where the input holds NaN, infinity and huge numbers."""
    padding = np.arange(len(data.input))[:, None] >= data.lengths
    assert padding.any()
    assert not np.isfinite(data.input[padding]).all()
    assert (results.gradients["input"][padding] == 0).all()
    assert (results.values[0][padding] == 0).all()


def check_gradients(name: str, form: str, runs: list[str]) -> None:
    config, cases = load(name)
    for run in runs:
        data, expected = cases[run]
        results = run_seqjax(config, form, data)
        assert_same(results, expected, FLOAT64_TOLERANCE)
        if data.lengths is not None:
            assert_padding_has_no_gradient(data, results)


def programs() -> Iterator[Any]:
    """What to compile for gradients, which takes all the time: forms and dense runs take turns.

    Every kind of cell is run with ragged input, with and without biases, alone and in the largest
    layer, and with dense input in a layer of one. Two layers of one direction add nothing for a
    cell but the order of their states: one kind with two states and one with a single state show
    it. The values of all kinds' two layers, in all runs, are in the test outside jit.
    """
    forms = itertools.cycle(LAYER_FORMS)
    for kind_index, kind in enumerate(generate.KINDS):
        dense = ("one_layer", "one_layer_bidirectional_no_bias")[kind_index % 2]
        for structure in generate.STRUCTURES:
            name = f"{kind}_{structure}"
            marks = [pytest.mark.quick] if structure == "one_layer" else []
            if structure != "two_layers" or kind in ("lstm_proj", "gru"):
                form = next(forms)
                label = f"{name}-ragged-{form}"
                yield pytest.param(name, RAGGED_RUNS, form, id=label, marks=marks)
            if structure == dense:
                form = next(forms)
                yield pytest.param(name, ["dense"], form, id=f"{name}-dense-{form}", marks=marks)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "runs", "form"), list(programs()))
def test_values_and_gradients(name: str, runs: list[str], form: str) -> None:
    check_gradients(name, form, runs)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "form"), OUTSIDE_JIT)
def test_every_form_outside_jit(name: str, form: str) -> None:
    config, cases = load(name)
    for data, expected in cases.values():
        values = run_seqjax_forward(config, form, data)
        for value, target in zip(values, expected.values, strict=True):
            assert_close(value, target, FLOAT64_TOLERANCE, form)


@pytest.mark.quick
@pytest.mark.parametrize("form", LAYER_FORMS)
@pytest.mark.parametrize("kind", generate.KINDS)
def test_float32(kind: str, form: str) -> None:
    config, cases = load(f"{kind}_one_layer")
    for run in RAGGED_RUNS:
        data, expected = cases[run]
        values = run_seqjax_forward(config, form, data, "float32")
        for value, target in zip(values, expected.values, strict=True):
            assert value.dtype == np.float32
            assert_close(value, target, FLOAT32_TOLERANCE, form)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", LAYER_FORMS)
@pytest.mark.parametrize("kind", generate.KINDS)
def test_one_sequence_without_batch(kind: str, form: str) -> None:
    """PyTorch gives a lone sequence the numbers of its row, and ignores batch_first for it."""
    config, cases = load(f"{kind}_one_layer_bidirectional_no_bias")
    data, expected = cases["dense"]
    for row in range(2):
        one = dataclasses.replace(
            data,
            input=data.input[:, row],
            states=tuple(state[:, row] for state in data.states),
            cotangents=(),
        )
        values = run_seqjax_forward(config, form, one)
        for value, target in zip(values, expected.values, strict=True):
            assert_close(value, target[:, row], FLOAT64_TOLERANCE, form)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", LAYER_FORMS)
@pytest.mark.parametrize("kind", generate.KINDS)
def test_no_state_means_zeros(kind: str, form: str) -> None:
    config, cases = load(f"{kind}_two_layers_bidirectional")
    data, _ = cases["ragged"]
    zeros = dataclasses.replace(data, states=tuple(0 * state for state in data.states))
    without = dataclasses.replace(data, states=None)
    for value, expected in zip(
        run_seqjax_forward(config, form, without),
        run_seqjax_forward(config, form, zeros),
        strict=True,
    ):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.quick
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", CELL_FORMS)
@pytest.mark.parametrize("name", generate.CELLS)
def test_cells(name: str, form: str) -> None:
    check_gradients(name, form, ["step"])


@pytest.mark.parametrize("form", CELL_FORMS)
@pytest.mark.parametrize("name", generate.CELLS)
def test_cells_float32(name: str, form: str) -> None:
    config, cases = load(name)
    data, expected = cases["step"]
    values = run_seqjax_forward(config, form, data, "float32")
    for value, target in zip(values, expected.values, strict=True):
        assert_close(value, target, FLOAT32_TOLERANCE, form)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", CELL_FORMS)
@pytest.mark.parametrize("name", generate.CELLS)
def test_cells_without_batch(name: str, form: str) -> None:
    config, cases = load(name)
    data, expected = cases["step"]
    one = dataclasses.replace(
        data, input=data.input[1], states=tuple(state[1] for state in data.states), cotangents=()
    )
    values = run_seqjax_forward(config, form, one)
    for value, target in zip(values, expected.values, strict=True):
        assert_close(value, target[1], FLOAT64_TOLERANCE, form)


@pytest.mark.parametrize("name", [*generate.LAYERS, *generate.CELLS])
def test_files_hide_nothing(name: str) -> None:
    """No number that a mistake would leave alone: each weight, state and gradient is its own."""
    config, cases = load(name)
    assert config == (generate.LAYERS | generate.CELLS)[name]
    assert set(cases) == set(generate.LENGTHS if name in generate.LAYERS else ["step"])
    for data, results in cases.values():
        arrays = [*data.weights.values(), *data.states, *data.cotangents]
        numbers = np.concatenate([array.ravel() for array in arrays])
        assert len(np.unique(numbers)) == len(numbers)
        assert np.abs(numbers).min() > 0
        assert set(results.gradients) >= {*data.weights, "input", "h_0"}
        for gradient in jax.tree.leaves(results.gradients):
            assert np.abs(gradient).max() > 1e-3
