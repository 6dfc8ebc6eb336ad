"""Settings for every test: strict dtype promotion, quick compilation, 64-bit types on request."""

from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
# Thousands of small programs run once each: what takes time is compiling them.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def x64() -> Iterator[None]:
    """Turns 64-bit types on for one test."""
    with jax.enable_x64(True):
        yield
