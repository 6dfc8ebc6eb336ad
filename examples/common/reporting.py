"""Progress while a program runs."""

import os
import platform
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Self, TypeVar

import jax
from tqdm import tqdm

T = TypeVar("T")


def progress(iterable: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """Shows a progress bar while iterating, and none where stderr is not a terminal."""
    hidden = not sys.stderr.isatty()
    return tqdm(iterable, description, total, leave=False, disable=hidden, dynamic_ncols=True)


class Progress:
    """Training's progress, with the loss and the speed in sequences per second.

    On a terminal it is a bar; elsewhere, ten lines at most, so that logs stay readable.

    Args:
      description: stands before everything else.
      steps: how many there will be at most.
      batch_size: sequences per step.
    """

    def __init__(self, description: str, steps: int, batch_size: int) -> None:
        self.description = description
        self.steps = steps
        self.batch_size = batch_size
        self.sequences_per_second = 0.0
        self._done = 0
        self._lines = 0
        self._start = time.perf_counter()
        self._bar = tqdm(
            total=steps,
            desc=description,
            unit="step",
            leave=False,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def advance(self, steps: int, loss: float) -> None:
        """Notes that `steps` more are done, and the loss in them."""
        now = time.perf_counter()
        if self._done:
            speed = (self._done + steps - self._first) * self.batch_size / (now - self._start)
            self.sequences_per_second = speed
        else:
            # The clock starts after the first call, which compiles.
            self._start, self._first = now, steps
        self._done += steps
        speed = f"{self.sequences_per_second:,.0f} sequences/s"
        self._bar.set_postfix_str(f"loss {loss:.3g}, {speed}", refresh=False)
        self._bar.update(steps)
        if self._bar.disable and self._done * 10 // self.steps > self._lines:
            self._lines = self._done * 10 // self.steps
            digits = len(str(self.steps))
            print(
                f"{self.description}: step {self._done:{digits}}/{self.steps}  "
                f"loss {loss:.3g}  {speed}",
                flush=True,
            )


def hardware() -> str:
    """What JAX computes on: an accelerator's name, or the processor's and its threads."""
    if jax.default_backend() != "cpu":
        return f"{jax.devices()[0].device_kind}; {jax.default_backend()}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # Not Linux.
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor()])[0]}, {os.cpu_count()} threads; cpu"
