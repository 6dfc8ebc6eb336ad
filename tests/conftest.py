"""Settings for every test: nothing is promoted, quick compilation, 64-bit types on request."""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)

# Thousands of small programs run once each: what takes time is compiling them. XLA reads its flags
# once, when it is first used, and pytest's workers inherit them.
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def xla_knows(flags: str) -> bool:
    """Whether this XLA has the flags; one that has not ends the process."""
    use = [sys.executable, "-c", "from jaxlib import xla_client; xla_client.CompileOptions()"]
    environment = os.environ | {"XLA_FLAGS": flags}
    return subprocess.run(use, env=environment, capture_output=True, check=False).returncode == 0


flags = os.environ.get("XLA_FLAGS", "")
if QUICK not in flags and xla_knows(QUICK):
    os.environ["XLA_FLAGS"] = f"{flags} {QUICK}"


# Files whose tests take longest come first, so that at the end no worker waits long for another.
LONGEST_FIRST = [
    "test_sharding.py",
    "test_example_resume.py",
    "test_golden.py",
    "test_example_devices.py",
    "test_contract.py",
    "test_whole_sequence.py",
    "test_benchmarks.py",
    "test_torch_shape.py",
    "test_recurrence.py",
    "test_decoding.py",
    "test_export.py",
    "test_initial_parameters.py",
    "test_checks.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves long files to the front; a file's own tests keep their order."""
    ranks = {name: rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


def pytest_collection_finish() -> None:
    """Everything is imported by then."""
    collect_garbage_rarely()


def collect_garbage_rarely() -> None:
    """Lets the garbage collector pass by what there is, and come more rarely to what follows.

    Tracing and compiling make many objects that stay. To look through all of them again and again
    was about a tenth of the work.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture
def x64() -> Iterator[None]:
    """Turns 64-bit types on for one test."""
    with jax.enable_x64(True):
        yield
