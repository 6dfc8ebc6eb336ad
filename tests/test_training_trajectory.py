"""Plain gradient descent from the same weights follows PyTorch's own run, step by step.

Both biases are parameters of their own here as there; merged, they would take other steps.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden import generate
from parity import empty_nnx_module, quick_compilation

TOLERANCES = {"float64": 1e-10, "float32": 1e-5}


class Model(nnx.Module):
    """The layer and a linear head at every step."""

    def __init__(self, kind: str, arrays: dict[str, np.ndarray], dtype: str) -> None:
        self.layer = empty_nnx_module(generate.TRAJECTORIES[kind], param_dtype=dtype)
        weights = {
            name.removeprefix("weights/"): array
            for name, array in arrays.items()
            if name.startswith("weights/")
        }
        self.layer.load_torch_state_dict(weights)
        self.head_weight = nnx.Param(jnp.asarray(arrays["head/weight"].astype(dtype)))
        self.head_bias = nnx.Param(jnp.asarray(arrays["head/bias"].astype(dtype)))

    def __call__(self, input: jax.Array, lengths: Any) -> jax.Array:
        output, _ = self.layer(input, lengths=lengths)
        return output @ self.head_weight[...].T + self.head_bias[...][None, None]


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation() -> Iterator[None]:
    with quick_compilation():
        yield


def train(kind: str, dtype: str) -> tuple[list[float], Model, dict[str, np.ndarray]]:
    arrays = generate.load(f"trajectory_{kind}")
    input, target = (jnp.asarray(arrays[name].astype(dtype)) for name in ("input", "target"))
    lengths = arrays["lengths"]
    valid = (np.arange(len(input))[:, None] < lengths)[..., None]
    count = int(valid.sum()) * target.shape[-1]
    model = Model(kind, arrays, dtype)
    optimizer = nnx.Optimizer(model, optax.sgd(generate.LEARNING_RATES[kind]), wrt=nnx.Param)

    @nnx.jit
    def step(model: Model, optimizer: Any) -> jax.Array:
        def loss(model: Model) -> jax.Array:
            squares = (model(input, lengths) - target) ** 2
            return jnp.sum(squares, where=valid) / count

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(generate.TRAINING_STEPS)]
    return losses, model, arrays


def assert_follows(kind: str, dtype: str) -> None:
    losses, model, arrays = train(kind, dtype)
    expected = arrays[f"losses_{dtype}"]
    assert expected[-1] < 0.7 * expected[0]  # A run that goes nowhere would prove nothing.
    np.testing.assert_allclose(losses, expected, rtol=TOLERANCES[dtype], atol=0)
    trained = model.layer.torch_state_dict()
    for name, weight in trained.items():
        assert weight.dtype == dtype
        tolerance = 10 * TOLERANCES[dtype]
        np.testing.assert_allclose(weight, arrays[f"trained/{name}"], rtol=0, atol=tolerance)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", generate.TRAJECTORIES)
def test_float64(kind: str) -> None:
    assert_follows(kind, "float64")


@pytest.mark.parametrize("kind", generate.TRAJECTORIES)
def test_float32(kind: str) -> None:
    assert_follows(kind, "float32")
