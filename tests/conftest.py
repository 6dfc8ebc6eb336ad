"""Settings for every test: strict dtype promotion, and 64-bit types where a test asks for them."""

from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def x64() -> Iterator[None]:
    """Turns 64-bit types on for one test."""
    with jax.enable_x64(True):
        yield
