"""Values and gradients against PyTorch as it is installed, over layers drawn at random.

Where torch is missing, `test_golden.py` compares with what it once wrote.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden import generate
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import (
    CELL_FORMS,
    LAYER_FORMS,
    Config,
    Data,
    assert_close,
    assert_initial_distribution,
    assert_same,
    quick_compilation,
    random_data,
    run_seqjax,
    run_seqjax_forward,
    run_torch,
)

import seqjax.nnx

torch = pytest.importorskip("torch")

TOLERANCE = 1e-11  # In float64; the weights here are larger than any that training starts from.
KINDS = [("RNN", {}), ("RNN", {"nonlinearity": "relu"}), ("LSTM", {}), ("GRU", {})]


@pytest.fixture(autouse=True, scope="module")
def _settings() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # At these sizes threads wait more than they work.
    with quick_compilation():
        yield
    torch.set_num_threads(threads)


@st.composite
def layers(draw: Any) -> Config:
    kind, options = draw(st.sampled_from(KINDS))
    hidden_size = draw(st.integers(1, 6))
    if kind == "LSTM" and hidden_size > 1 and draw(st.booleans()):
        options = {"proj_size": draw(st.integers(1, hidden_size - 1))}
    return Config(
        kind,
        input_size=draw(st.integers(1, 5)),
        hidden_size=hidden_size,
        num_layers=draw(st.integers(1, 2)),
        bidirectional=draw(st.booleans()),
        bias=draw(st.booleans()),
        **options,
    )


@st.composite
def runs(draw: Any, config: Config) -> Data:
    """Dense, ragged with lengths in any order, or one sequence without a batch."""
    steps = draw(st.integers(1, 7))
    batch_shape = draw(st.sampled_from([(), (1,), (2,), (3,), (5,)]))
    lengths = None
    if batch_shape and draw(st.integers(0, 2)):
        size = batch_shape[0]
        lengths = draw(st.lists(st.integers(1, steps), min_size=size, max_size=size))
    return random_data(
        config,
        draw(st.integers(0, 2**32 - 1)),
        steps,
        batch_shape,
        lengths,
        with_states=draw(st.booleans()),
    )


def check_ragged_gradient(data: Data, input_gradient: np.ndarray) -> None:
    if data.lengths is not None:
        padding = np.arange(len(data.input))[:, None] >= data.lengths
        assert (input_gradient[padding] == 0).all()


@settings(max_examples=12, deadline=None, database=None, derandomize=True)
@given(data=st.data())
def test_any_layer(data: Any) -> None:
    config = data.draw(layers())
    run = data.draw(runs(config))
    form = data.draw(st.sampled_from(LAYER_FORMS))
    with jax.enable_x64(True):
        results = run_seqjax(config, form, run)
        assert_same(results, run_torch(config, run), TOLERANCE)
        check_ragged_gradient(run, results.gradients["input"])


@pytest.mark.parametrize(
    ("config", "form"),
    [
        (Config("RNN", input_size=2, hidden_size=4), "linen batch_first"),
        (Config("LSTM", input_size=4, hidden_size=3, proj_size=2, bidirectional=True), "nnx"),
        (Config("GRU", input_size=3, hidden_size=4, num_layers=2), "core"),
    ],
)
def test_any_lengths(config: Config, form: str) -> None:
    """Many patterns through one program: only the lengths and the numbers change."""

    @settings(max_examples=30, deadline=None, database=None, derandomize=True)
    @given(
        lengths=st.lists(st.integers(1, 6), min_size=4, max_size=4),
        seed=st.integers(0, 2**32 - 1),
        padding=st.lists(st.sampled_from([np.nan, np.inf, -np.inf, 1e300, 1.0]), min_size=1),
    )
    def check(lengths: list[int], seed: int, padding: list[float]) -> None:
        run = random_data(config, seed, 6, (4,), lengths, tuple(padding))
        results = run_seqjax(config, form, run)
        assert_same(results, run_torch(config, run), TOLERANCE)
        check_ragged_gradient(run, results.gradients["input"])

    with jax.enable_x64(True):
        check()


@pytest.mark.parametrize("turn", range(3))
@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_any_cell(kind: str, turn: int, x64: None) -> None:
    """Batched, alone, and without a state; the interfaces take turns."""
    config = Config(kind, input_size=4, hidden_size=3)
    form = CELL_FORMS[(turn + len(kind)) % 3]
    batch_shape, with_states = [((3,), True), ((), True), ((3,), False)][turn]
    run = random_data(config, turn, None, batch_shape, with_states=with_states)
    assert_same(run_seqjax(config, form, run), run_torch(config, run), TOLERANCE)


@pytest.mark.parametrize("form", LAYER_FORMS)
def test_empty_batch(form: str, x64: None) -> None:
    config = Config("GRU", input_size=3, hidden_size=4, num_layers=2)
    run = random_data(config, 0, 5, (0,))
    assert_same(run_seqjax(config, form, run), run_torch(config, run), TOLERANCE)


@pytest.mark.parametrize("form", LAYER_FORMS)
def test_length_zero_is_no_step(form: str, x64: None) -> None:
    """PyTorch refuses it; the other rows are as if the empty one were not there."""
    config = Config("LSTM", input_size=3, hidden_size=4, bidirectional=True)
    run = random_data(config, 0, 5, (4,), [2, 0, 5, 0])
    rows = [0, 2]
    assert run.states is not None
    rest = dataclasses.replace(
        run,
        input=run.input[:, rows],
        states=tuple(state[:, rows] for state in run.states),
        cotangents=tuple(cotangent[:, rows] for cotangent in run.cotangents),
        lengths=np.array([2, 5]),
    )
    output, *final = run_seqjax_forward(config, form, run)
    expected = run_torch(config, rest).values
    for value, target in zip((output, *final), expected, strict=True):
        assert_close(value[:, rows], target, TOLERANCE, form)
    assert (output[:, [1, 3]] == 0).all()
    for state, initial in zip(final, run.states, strict=True):
        np.testing.assert_array_equal(state[:, [1, 3]], initial[:, [1, 3]])


@pytest.mark.parametrize(("kind", "ragged"), [("RNN", True), ("LSTM", False), ("GRU", False)])
def test_dropout_of_rate_one(kind: str, ragged: bool, x64: None) -> None:
    """The one rate at which PyTorch's dropout is no matter of chance: gradients included."""
    config = Config(
        kind, input_size=3, hidden_size=4, num_layers=2, bidirectional=ragged, dropout=1.0
    )
    run = random_data(config, 0, 5, (3,), [2, 5, 1] if ragged else None)
    theirs = run_torch(config, run)
    module = getattr(seqjax.nnx, kind)(**config.arguments, param_dtype="float64", rngs=nnx.Rngs(0))
    module.load_torch_state_dict(run.weights)
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    @jax.jit
    def values_and_gradients(params: Any, input: jax.Array, states: Any) -> Any:
        def values(params: Any, input: jax.Array, states: Any) -> Any:
            hx = states if config.is_lstm else states[0]
            layer = nnx.merge(graph, params, rest)
            output, final = layer(input, hx, lengths=run.lengths, rngs=jax.random.key(0))
            return (output, *final) if config.is_lstm else (output, final)

        outputs, pull_back = jax.vjp(values, params, input, states)
        return outputs, pull_back(jax.tree.map(jnp.asarray, run.cotangents))

    outputs, (of_params, of_input, _) = values_and_gradients(params, run.input, run.states)
    for output, expected in zip(outputs, theirs.values, strict=True):
        assert_close(np.asarray(output), expected, TOLERANCE, kind)
    assert_close(np.asarray(of_input), theirs.gradients["input"], TOLERANCE, "input")
    for name, gradient in nnx.merge(graph, of_params, rest).torch_state_dict().items():
        assert_close(gradient, theirs.gradients[name], TOLERANCE, name)


def test_dropout_scale_and_share_are_theirs() -> None:
    """At another rate only the two possible values and the share of zeros can be compared."""
    rate, size = 0.3, 64
    arguments = {"num_layers": 2, "nonlinearity": "relu", "dropout": rate}
    theirs = torch.nn.RNN(size, size, **arguments)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            weight.copy_(torch.eye(size) if "weight_ih" in name else torch.zeros(weight.shape))
    torch.manual_seed(0)
    expected, expected_h = theirs(torch.ones(20, 10, size))
    ours = seqjax.nnx.RNN.from_torch(theirs)
    output, h_n = ours(jnp.ones((20, 10, size)))
    expected, output = expected.detach().numpy(), np.asarray(output)
    np.testing.assert_allclose(np.unique(output), np.unique(expected), rtol=1e-6)
    error = np.sqrt(2 * rate * (1 - rate) / output.size)
    assert abs((output == 0).mean() - (expected == 0).mean()) < 5 * error
    np.testing.assert_array_equal(h_n[0], expected_h[0].detach())
    np.testing.assert_array_equal(h_n[1], output[-1])


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_torch_starts_from_the_same_distribution(kind: str) -> None:
    """The check that our own initial weights pass is one that PyTorch's pass."""
    torch.manual_seed(0)
    options = {"proj_size": 30} if kind == "LSTM" else {}
    module = getattr(torch.nn, kind)(40, 100, 2, bidirectional=True, **options)
    weights = {name: weight.detach().numpy() for name, weight in module.named_parameters()}
    assert_initial_distribution(weights, 100)


@pytest.mark.parametrize("name", [*generate.LAYERS, *generate.CELLS])
def test_golden_files_are_what_torch_gives(name: str) -> None:
    stored, fresh = generate.load(name), generate.flatten(*generate.make_case(name))
    assert stored.keys() == fresh.keys()
    for key, array in fresh.items():
        if array.dtype == np.float64:
            np.testing.assert_allclose(stored[key], array, rtol=1e-12, atol=1e-12, err_msg=key)
        else:
            np.testing.assert_array_equal(stored[key], array, err_msg=key)


@pytest.mark.parametrize("kind", generate.TRAJECTORIES)
def test_golden_trajectories_are_what_torch_gives(kind: str, monkeypatch: Any) -> None:
    """Its first steps; the rest follows from them."""
    monkeypatch.setattr(generate, "TRAINING_STEPS", 5)
    stored, fresh = generate.load(f"trajectory_{kind}"), generate.make_trajectory(kind)
    assert stored.keys() == fresh.keys()
    for key, array in fresh.items():
        if key.startswith("losses"):
            tolerance = 1e-12 if array.dtype == np.float64 else 1e-6
            np.testing.assert_allclose(stored[key][:5], array, rtol=tolerance)
        elif not key.startswith("trained"):
            np.testing.assert_array_equal(stored[key], array)
