"""Initial distributions of the weights."""

import itertools
import math
from typing import Any

import cases
import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import seqjax
from seqjax.initializers import forget_bias, orthogonal, torch_uniform


def assert_uniform(values: Any, bound: float) -> None:
    """Kolmogorov and Smirnov's test: of draws from U(-bound, bound), one in 10^6 fails it."""
    values = np.sort(np.asarray(values, np.float64).ravel())
    assert -bound <= values[0]
    assert values[-1] <= bound
    distribution = (values / bound + 1) / 2
    steps = np.arange(len(values) + 1) / len(values)
    distance = max(np.abs(distribution - steps[1:]).max(), np.abs(distribution - steps[:-1]).max())
    assert distance < math.sqrt(-math.log(0.5e-6) / 2 / len(values))


class TestTorchUniform:
    @pytest.mark.parametrize("hidden_size", [1, 4, 100])
    def test_distribution(self, hidden_size: int) -> None:
        values = torch_uniform(hidden_size)(jax.random.key(0), (100, 100), jnp.float32)
        assert_uniform(values, 1 / math.sqrt(hidden_size))

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_dtype_and_shape(self, dtype: str) -> None:
        values = torch_uniform(4)(jax.random.key(0), (30, 40), dtype)
        assert (values.shape, values.dtype) == ((30, 40), dtype)
        assert np.abs(values.astype(np.float32)).max() <= 0.5

    def test_float64(self, x64: None) -> None:
        values = torch_uniform(4)(jax.random.key(0), (100,), jnp.float64)
        assert values.dtype == jnp.float64
        assert not np.array_equal(values, values.astype(np.float32))

    def test_default_dtype(self) -> None:
        """As in `jax.nn.initializers`, so that it can stand in for one of them."""
        assert torch_uniform(4)(jax.random.key(0), (2,)).dtype == jnp.float32  # type: ignore[call-arg]

    def test_key_decides(self) -> None:
        init = torch_uniform(4)
        first, again, other = (init(jax.random.key(seed), (9,), float) for seed in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert not np.any(first == other)

    def test_the_test_notices_another_distribution(self) -> None:
        draws = jax.random.normal(jax.random.key(0), (10_000,))
        for wrong in (0.4 * draws / jnp.abs(draws).max(), jnp.abs(draws) % 0.5, jnp.zeros(10_000)):
            with pytest.raises(AssertionError):
                assert_uniform(wrong, 0.5)


class TestOrthogonal:
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2), ("float16", 2e-3)]
    )
    @pytest.mark.parametrize("gates", [1, 3])
    def test_every_square(self, gates: int, dtype: str, tolerance: float) -> None:
        weight = orthogonal(2.0)(jax.random.key(0), (5, 5 * gates), dtype)
        assert (weight.shape, weight.dtype) == ((5, 5 * gates), dtype)
        squares = np.split(np.asarray(weight, np.float64), gates, axis=1)
        for square in squares:
            np.testing.assert_allclose(square @ square.T / 4, np.eye(5), atol=tolerance)
        for one, other in itertools.combinations(squares, 2):
            assert np.abs(one - other).max() > 0.1

    def test_float64(self, x64: None) -> None:
        weight = orthogonal()(jax.random.key(0), (5, 10), jnp.float64)
        np.testing.assert_allclose(weight @ weight.T, 2 * np.eye(5), atol=1e-14)

    @pytest.mark.parametrize("shape", [(7, 3), (4, 6), (5, 5)])
    def test_other_shapes_are_jaxs(self, shape: tuple[int, int]) -> None:
        key = jax.random.key(0)
        expected = jax.nn.initializers.orthogonal(0.5)(key, shape, jnp.float32)
        np.testing.assert_array_equal(orthogonal(0.5)(key, shape, jnp.float32), expected)

    def test_what_is_no_matrix(self) -> None:
        with pytest.raises(ValueError, match=r"orthogonal draws matrices.*got shape: \(5,\)"):
            orthogonal()(jax.random.key(0), (5,), jnp.float32)


class TestForgetBias:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_two_biases_give_the_value(self, dtype: str) -> None:
        b_ih, b_hh = (forget_bias(0.7)(jax.random.key(seed), (8,), dtype) for seed in range(2))
        assert b_ih.dtype == dtype
        zero, value = jnp.array([0, 0.7], dtype)
        np.testing.assert_array_equal(
            b_ih + b_hh, jnp.repeat(jnp.array([zero, value, zero, zero]), 2)
        )

    @pytest.mark.parametrize("shape", [(6,), (2, 8), ()])
    def test_other_shapes(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"draws an LSTM's biases, of shape .*got shape: "):
            forget_bias()(jax.random.key(0), shape, jnp.float32)

    def test_is_a_value(self) -> None:
        """Linen modules with it are equal, too, so that a program is compiled once."""
        assert forget_bias(2.0) == forget_bias(2.0) != forget_bias()
        assert hash(forget_bias()) == hash(forget_bias(1.0))


class TestLayers:
    @pytest.mark.parametrize(
        "cell",
        [
            seqjax.RNNCell(100, 64),
            seqjax.GRUCell(100, 64),
            seqjax.LSTMCell(100, 64),
            seqjax.LSTMCell(100, 64, proj_size=16),
        ],
        ids=["rnn", "gru", "lstm", "lstm_proj"],
    )
    def test_every_parameter_is_pytorchs(self, cell: seqjax.Cell) -> None:
        """Biases and the projection, too; and with a projection it is still hidden_size."""
        params = contract.quick_jit(cell.init)(jax.random.key(0))
        for name, values in params._asdict().items():
            if values is not None:
                assert_uniform(values, 1 / math.sqrt(64))
                assert np.abs(values).max() > 0.8 / math.sqrt(64), name

    @pytest.mark.parametrize("name", ["lstm_proj", "stack", "stack_bidirectional"])
    def test_no_number_is_drawn_twice(self, name: str) -> None:
        init = contract.quick_jit(cases.LAYERS[name].init)
        leaves = jax.tree.leaves(init(jax.random.key(0)))
        numbers = np.concatenate([np.ravel(leaf) for leaf in leaves])
        # float32 draws of 23 bits may coincide by chance, though hardly two of a few hundred.
        assert len(np.unique(numbers)) >= len(numbers) - 1

    def test_key_decides(self) -> None:
        cell = cases.LAYERS["gru"]
        first, again, other = (cell.init(jax.random.key(seed)) for seed in (0, 0, 1))
        jax.tree.map(np.testing.assert_array_equal, first, again)
        assert not np.any(first.w_ih == other.w_ih)

    def test_old_style_keys(self) -> None:
        cell = cases.LAYERS["gru"]
        jax.tree.map(
            np.testing.assert_array_equal,
            cell.init(jax.random.PRNGKey(0)),
            cell.init(jax.random.key(0)),
        )
