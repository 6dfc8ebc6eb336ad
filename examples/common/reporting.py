"""Progress while a program runs, on a terminal and in a log."""

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

SECONDS_BETWEEN_LINES = 30.0  # Where stderr is not a terminal.


def progress(iterable: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """Shows a progress bar while iterating, and none where stderr is not a terminal."""
    hidden = not sys.stderr.isatty()
    return tqdm(iterable, description, total, leave=False, disable=hidden, dynamic_ncols=True)


class Meter:
    """Steps done, loss and speed: a bar on a terminal, in a log a line every half minute.

    Args:
      description: what is going on, for example `epoch 3`.
      total: how many steps there are,
      done: and how many of them before.
      unit: what is counted, in the plural.
    """

    def __init__(
        self, description: str, total: int, done: int = 0, unit: str = "sequences"
    ) -> None:
        self.unit = unit
        self.speed = 0.0  # Units a second.
        self._description, self._total, self._done = description, total, done
        self._started = self._printed = time.perf_counter()
        self._units: int | None = None  # Since then.
        self._bar = tqdm(
            desc=description, total=total, initial=done, leave=False, dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def advance(self, units: int, steps: int = 1) -> None:
        """Counts steps, of so many units in all."""
        self._done += steps
        now = time.perf_counter()
        if self._units is None:
            # What is told of the first call is all there is so far; then the clock starts anew,
            # since that call compiles.
            self.speed = units / max(now - self._started, 1e-9)
            self._started, self._units = now, 0
        else:
            self._units += units
            self.speed = self._units / max(now - self._started, 1e-9)
        self._bar.update(steps)

    def show(self, loss: float) -> None:
        """Shows a loss beside what was counted."""
        text = f"loss {loss:.4g}, {self.speed:,.0f} {self.unit}/s"
        self._bar.set_postfix_str(text, refresh=False)
        now = time.perf_counter()
        if self._bar.disable and now - self._printed > SECONDS_BETWEEN_LINES:
            self._printed = now
            print(f"{self._description}: step {self._done} of {self._total}, {text}", flush=True)


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
