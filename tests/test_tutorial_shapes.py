"""The shapes that PyTorch's tutorials show, from both shells."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import quick_compilation

import seqjax.linen
import seqjax.nnx

Call = Callable[..., tuple[jax.Array, Any]]


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation() -> Iterator[None]:
    with quick_compilation():
        yield


def nnx_call(kind: str, *args: Any, **kwargs: Any) -> Call:
    return getattr(seqjax.nnx, kind)(*args, **kwargs, rngs=nnx.Rngs(0))


def linen_call(kind: str, *args: Any, **kwargs: Any) -> Call:
    module = getattr(seqjax.linen, kind)(*args, **kwargs)

    def call(*inputs: Any, **options: Any) -> Any:
        return module.init_with_output(jax.random.key(0), *inputs, **options)[0]

    return call


pytestmark = [pytest.mark.quick, pytest.mark.parametrize("make", [nnx_call, linen_call])]


def test_rows_of_digits(make: Callable[..., Call]) -> None:
    lstm = make("LSTM", 28, 256, 2, batch_first=True)
    output, (h_n, c_n) = lstm(jnp.ones((2, 20, 28)))
    assert output.shape == (2, 20, 256)
    assert h_n.shape == c_n.shape == (2, 2, 256)


def test_bidirectional(make: Callable[..., Call]) -> None:
    lstm = make("LSTM", 10, 20, 2, bidirectional=True, batch_first=True)
    output, (h_n, c_n) = lstm(jnp.ones((1, 35, 10)))
    assert output.shape == (1, 35, 40)
    assert h_n.shape == c_n.shape == (4, 1, 20)


def test_plain_rnn(make: Callable[..., Call]) -> None:
    output, h_n = make("RNN", 3, 4)(jnp.ones((5, 1, 3)))
    assert output.shape == (5, 1, 4)
    assert h_n.shape == (1, 1, 4)


def test_ten_sequences(make: Callable[..., Call]) -> None:
    """What PyTorch packs, in the order in which the sequences came."""
    lengths = np.array([20, 5, 8, 10, 15, 18, 17, 6, 6, 18])
    gru = make("GRU", 256, 512, 2, bidirectional=True)
    output, h_n = gru(jnp.ones((20, 10, 256)), lengths=lengths)
    assert output.shape == (20, 10, 1024)
    assert h_n.shape == (4, 10, 512)
    used = np.asarray((output != 0).any(axis=-1))
    np.testing.assert_array_equal(used, np.arange(20)[:, None] < lengths)
