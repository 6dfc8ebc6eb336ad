"""Every weight and bias starts as PyTorch's do: uniform in +-1/sqrt(hidden_size)."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import Arrays, assert_initial_distribution, quick_compilation

import seqjax.linen
import seqjax.nnx

HIDDEN_SIZE = 100
MODULES = [
    ("RNN", {"num_layers": 2, "bidirectional": True}),
    ("GRU", {"num_layers": 2, "bidirectional": True}),
    ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 30}),
    ("RNNCell", {}),
    ("GRUCell", {}),
    ("LSTMCell", {}),
]


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation() -> Iterator[None]:
    with quick_compilation():
        yield


def initial_weights(shell: str, kind: str, seed: int, **arguments: Any) -> Arrays:
    if shell == "nnx":
        make = getattr(seqjax.nnx, kind)
        return make(40, HIDDEN_SIZE, **arguments, rngs=nnx.Rngs(seed)).torch_state_dict()
    module = getattr(seqjax.linen, kind)(40, HIDDEN_SIZE, **arguments)
    variables = module.init(jax.random.key(seed), jnp.ones((1, 40)))
    return seqjax.linen.torch_state_dict(module, variables)


@pytest.mark.parametrize(("kind", "arguments"), MODULES)
@pytest.mark.parametrize("shell", ["nnx", "linen"])
def test_uniform_by_hidden_size(shell: str, kind: str, arguments: dict[str, Any]) -> None:
    weights = initial_weights(shell, kind, 0, **arguments)
    assert_initial_distribution(weights, HIDDEN_SIZE)

    # Independent of each other, and drawn anew from another key. Only equal sizes compare.
    others = {
        f"other {name}": w for name, w in initial_weights(shell, kind, 1, **arguments).items()
    }
    arrays = list((weights | others).items())
    for index, (name, array) in enumerate(arrays):
        for other_name, other in arrays[:index]:
            if array.size == other.size:
                correlation = np.corrcoef(array.ravel(), other.ravel())[0, 1]
                assert abs(correlation) < 5 / math.sqrt(array.size), (name, other_name)


def test_check_notices_another_distribution() -> None:
    """What the check is for: a wrong bound, another shape, and zero biases."""
    rng = np.random.default_rng(0)
    bound = 1 / math.sqrt(HIDDEN_SIZE)
    right = rng.uniform(-bound, bound, 4000)
    assert_initial_distribution({"bias": right}, HIDDEN_SIZE)
    normal = np.clip(rng.normal(0, bound / math.sqrt(3), 4000), -bound, bound)
    for wrong in (0 * right, 1.1 * right, 0.9 * right, np.abs(right), normal):
        with pytest.raises(AssertionError):
            assert_initial_distribution({"bias": wrong}, HIDDEN_SIZE)
