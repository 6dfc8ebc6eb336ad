"""Runs the example programs as processes of their own, for tests that kill them."""

import contextlib
import multiprocessing
import sys
import warnings
from multiprocessing.process import BaseProcess
from pathlib import Path

EXAMPLES = str(Path(__file__).parents[1] / "examples")

# Children are forked off one process that has imported what is slow to import, and computed
# nothing.
_context = multiprocessing.get_context("forkserver")
SLOW = ["jax", "flax.nnx", "optax", "orbax.checkpoint", "sklearn.datasets", "matplotlib.pyplot"]
_context.set_forkserver_preload(["programs", *SLOW])


def start(
    program: str, argv: list[str], *, output: Path, cache: Path, devices: int = 1
) -> BaseProcess:
    """Starts a program of examples/, with warnings as errors.

    Args:
      program: its module.
      argv: its options.
      output: file for what it prints.
      cache: folder for what JAX compiles, so that the next process need not.
      devices: how many this machine's CPU should look like.
    """
    process = _context.Process(target=_run, args=(program, argv, output, cache, devices))
    process.start()
    return process


def _run(program: str, argv: list[str], output: Path, cache: Path, devices: int) -> None:
    import jax

    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_disable_most_optimizations", True)
    if devices > 1:
        jax.config.update("jax_num_cpu_devices", devices)
    warnings.simplefilter("error")
    sys.path.insert(0, EXAMPLES)
    with (
        output.open("w") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            status = __import__(program).main(argv)
        except SystemExit as end:
            status = end.code
        # Python's exit handlers do not run here. JAX's waits for the other processes.
        if jax.distributed.is_initialized():
            jax.distributed.shutdown()
        sys.exit(status)


def finish(process: BaseProcess, output: Path, status: int = 0) -> str:
    """Waits for a process, checks its exit status and returns what it printed."""
    process.join(timeout=240)
    printed = output.read_text()
    assert process.exitcode == status, f"exit status {process.exitcode}\n{printed}"
    return printed
