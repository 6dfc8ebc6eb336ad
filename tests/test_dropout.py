"""Dropout between layers, as PyTorch has it: where it acts, how it scales, and when."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import Config, quick_compilation, random_data

import seqjax
import seqjax.linen
import seqjax.nnx

SIZE = 16
STEPS, BATCH = 12, 10
FORMS = ("core", "nnx", "linen")
Call = Callable[..., tuple[jax.Array, jax.Array]]


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation() -> Iterator[None]:
    with quick_compilation():
        yield


def transparent_rnn(num_layers: int, bidirectional: bool = False) -> dict[str, np.ndarray]:
    """Weights that make relu layers hand positive inputs on unchanged, so that masks show.

    Both directions of a layer add half of what both directions below gave.
    """
    directions = 2 if bidirectional else 1
    weights = {}
    for layer in range(num_layers):
        copies = directions if layer else 1
        for suffix in ("", "_reverse")[:directions]:
            name = f"l{layer}{suffix}"
            weights[f"weight_ih_{name}"] = np.hstack([np.eye(SIZE) / copies] * copies)
            weights[f"weight_hh_{name}"] = np.zeros((SIZE, SIZE))
            weights[f"bias_ih_{name}"] = np.zeros(SIZE)
            weights[f"bias_hh_{name}"] = np.zeros(SIZE)
    return weights


def make_call(form: str, config: Config, weights: dict[str, np.ndarray]) -> Call:
    """`call(input, training=..., seed=..., **options)` of a module with these weights."""
    if form == "core":
        layer = config.core_layer()
        params = seqjax.interop.params_from_torch(weights, "float32")

        def core(input: Any, training: bool = True, seed: int = 0, **options: Any) -> Any:
            if "lengths" in options:
                options["mask"] = seqjax.lengths_to_mask(options.pop("lengths"), len(input))
            key = jax.random.key(seed) if training else None
            carry, output = seqjax.scan(layer, params, input, key=key, **options)
            cells = [cell for entry in carry for cell in jax.tree.leaves(entry)]
            return output, jnp.stack(cells)

        return core
    if form == "nnx":
        module = getattr(seqjax.nnx, config.kind)(**config.arguments, rngs=nnx.Rngs(0))
        module.load_torch_state_dict(weights)

        def in_nnx(input: Any, training: bool = True, seed: int = 0, **options: Any) -> Any:
            module.train() if training else module.eval()
            rngs = nnx.Rngs(dropout=seed) if training else None
            return module(input, rngs=rngs, **options)

        return in_nnx
    linen_module = getattr(seqjax.linen, config.kind)(**config.arguments)
    empty = linen_module.init(jax.random.key(0), jnp.ones((1, SIZE)), deterministic=True)
    variables = seqjax.linen.load_torch_state_dict(linen_module, empty, weights)

    def in_linen(input: Any, training: bool = True, seed: int = 0, **options: Any) -> Any:
        rngs = {"dropout": jax.random.key(seed)} if training else None
        return linen_module.apply(
            variables, input, deterministic=not training, rngs=rngs, **options
        )

    return in_linen


def transparent(form: str, rate: float, num_layers: int, bidirectional: bool = False) -> Call:
    config = Config(
        "RNN",
        input_size=SIZE,
        hidden_size=SIZE,
        num_layers=num_layers,
        nonlinearity="relu",
        dropout=rate,
        bidirectional=bidirectional,
    )
    return make_call(form, config, transparent_rnn(num_layers, bidirectional))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rate", [0.25, 0.5, 0.9])
def test_mask_and_scale(form: str, rate: float) -> None:
    """Between two layers: an element is 0 or 1 / (1 - p) times itself, and the rest is untouched.

    One factor of 1 / (1 - p) also shows that neither the input nor the last output is dropped.
    """
    input = jnp.ones((STEPS, BATCH, SIZE))
    output, h_n = transparent(form, rate, 2)(input)
    output = np.asarray(output)
    kept = output != 0
    np.testing.assert_allclose(output[kept], 1 / (1 - rate), rtol=1e-6)
    standard_error = np.sqrt(rate * (1 - rate) / kept.size)
    assert abs(kept.mean() - (1 - rate)) < 5 * standard_error
    np.testing.assert_array_equal(h_n[0], input[-1])  # Layer 1's own state is never dropped,
    np.testing.assert_array_equal(h_n[1], output[-1])  # and layer 2's is what it put out.


@pytest.mark.parametrize("form", FORMS)
def test_fresh_mask_for_every_step_row_feature_and_call(form: str) -> None:
    call = transparent(form, 0.5, 2)
    input = jnp.ones((STEPS, BATCH, SIZE))
    kept = np.asarray(call(input)[0] != 0)
    by_axis = {
        "steps": kept.reshape(STEPS, -1),
        "rows": kept.swapaxes(0, 1).reshape(BATCH, -1),
        "features": kept.reshape(-1, SIZE).T,
        "calls": np.stack([kept.ravel(), np.asarray(call(input, seed=1)[0] != 0).ravel()]),
    }
    for name, masks in by_axis.items():
        correlations = np.corrcoef(masks)[np.triu_indices(len(masks), 1)]
        assert np.abs(correlations).max() < 5 / np.sqrt(masks.shape[1]), name
    np.testing.assert_array_equal(kept, call(input, seed=0)[0] != 0)  # The key decides.


@pytest.mark.parametrize("form", FORMS)
def test_once_at_each_boundary(form: str) -> None:
    """Three layers have two boundaries, and their masks are independent."""
    output, h_n = transparent(form, 0.5, 3)(jnp.ones((STEPS, BATCH, SIZE)))
    output = np.asarray(output)
    assert set(np.unique(output)) == {0, 4}
    assert abs((output != 0).mean() - 1 / 4) < 5 * np.sqrt(3 / 16 / output.size)
    assert set(np.unique(h_n[0])) == {1}
    assert set(np.unique(h_n[1])) == {0, 2}
    assert set(np.unique(h_n[2])) == {0, 4}


@pytest.mark.parametrize("form", FORMS)
def test_directions_are_dropped_apart(form: str) -> None:
    """A feature of both directions, 1/2 each, is dropped in none, one or both of them."""
    output, _ = transparent(form, 0.5, 2, bidirectional=True)(jnp.ones((STEPS, BATCH, SIZE)))
    output = np.asarray(output)
    # Both directions of the second layer read the same dropped features.
    np.testing.assert_array_equal(output[..., :SIZE], output[..., SIZE:])
    values, counts = np.unique(output[..., :SIZE], return_counts=True)
    assert values.tolist() == [0, 1, 2]
    total = counts.sum()
    for count, probability in zip(counts, (1 / 4, 1 / 2, 1 / 4), strict=True):
        error = np.sqrt(probability * (1 - probability) / total)
        assert abs(count / total - probability) < 5 * error


@pytest.mark.parametrize("form", FORMS)
def test_padding_stays_zero(form: str) -> None:
    lengths = np.arange(1, BATCH + 1)
    input = np.ones((STEPS, BATCH, SIZE), np.float32)
    padding = np.arange(STEPS)[:, None] >= lengths
    input[padding] = np.nan
    output, h_n = transparent(form, 0.5, 2)(input, lengths=lengths)
    output = np.asarray(output)
    assert (output[padding] == 0).all()
    assert set(np.unique(output[~padding])) == {0, 2}
    np.testing.assert_array_equal(h_n[1], output[lengths - 1, np.arange(BATCH)])


@pytest.mark.parametrize("form", FORMS)
def test_no_dropout_outside_training(form: str) -> None:
    input = jnp.ones((STEPS, BATCH, SIZE))
    output, _ = transparent(form, 0.5, 2)(input, training=False)
    np.testing.assert_array_equal(output, input)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_rate_one_feeds_zeros_to_the_next_layer(kind: str, form: str) -> None:
    """The second layer of a stack gives what it gives alone, from an input of zeros."""
    sizes = {"input_size": SIZE, "hidden_size": SIZE}
    stack = Config(kind, **sizes, num_layers=2, dropout=1.0)
    data = random_data(stack, 0, STEPS, (BATCH,), with_states=False)
    weights = {name: 0.2 * weight for name, weight in data.weights.items()}
    layers = [
        {name[:-1] + "0": weight for name, weight in weights.items() if name.endswith(f"_l{index}")}
        for index in range(2)
    ]
    input = jnp.asarray(data.input, "float32")
    alone = [make_call("nnx", Config(kind, **sizes), weights) for weights in layers]
    _, first_state = alone[0](input)
    expected_output, second_state = alone[1](jnp.zeros_like(input))

    output, state = make_call(form, stack, weights)(input)
    np.testing.assert_allclose(output, expected_output, rtol=0, atol=1e-6)
    expected_state = jax.tree.map(
        lambda *h: jnp.concatenate(h), *(jax.tree.leaves(s) for s in (first_state, second_state))
    )
    if form == "core":  # Its leaves come as h, c of one layer after the other.
        expected_state = [jnp.stack(expected_state, axis=1).reshape(-1, BATCH, SIZE)]
    for one, other in zip(jax.tree.leaves(state), expected_state, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def test_rate_one_has_finite_gradients() -> None:
    call = transparent("core", 1.0, 2)
    input = jnp.ones((STEPS, BATCH, SIZE))
    gradient = jax.grad(lambda x: call(x)[0].sum())(input)
    np.testing.assert_array_equal(gradient, 0)
    # The first layer's state does not go through dropout, and neither does its gradient.
    gradient = jax.grad(lambda x: call(x)[1].sum())(input)
    np.testing.assert_array_equal(gradient[-1], 1)


def test_gradient_passes_where_the_mask_does() -> None:
    call = transparent("core", 0.5, 2)
    input = jnp.ones((STEPS, BATCH, SIZE))
    output, pull_back = jax.vjp(lambda x: call(x)[0], input)
    np.testing.assert_array_equal(pull_back(jnp.ones_like(output))[0], output)


def test_nnx_modes_and_streams() -> None:
    """train() and eval() switch it, each call draws anew, and `deterministic` overrides."""
    rnn = seqjax.nnx.RNN(SIZE, SIZE, 2, nonlinearity="relu", dropout=0.5, rngs=nnx.Rngs(0))
    rnn.load_torch_state_dict(transparent_rnn(2))
    input = jnp.ones((STEPS, BATCH, SIZE))
    rnn.train()
    one, other = rnn(input)[0], rnn(input)[0]
    assert (one != other).any()
    assert set(np.unique(one)) == {0, 2}
    np.testing.assert_array_equal(rnn(input, deterministic=True)[0], input)
    rnn.eval()
    np.testing.assert_array_equal(rnn(input)[0], input)
    assert set(np.unique(rnn(input, deterministic=False)[0])) == {0, 2}
