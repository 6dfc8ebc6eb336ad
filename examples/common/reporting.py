"""Progress while a program runs, on a terminal and in a log."""

import sys
import time
from collections.abc import Iterable
from typing import TypeVar

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

    def __init__(self, description: str, total: int, done: int, unit: str) -> None:
        self.unit = unit
        self.speed = 0.0  # Units a second, since this meter began.
        self._started = self._printed = time.perf_counter()
        self._units = 0
        self._bar = tqdm(
            desc=description, total=total, initial=done, leave=False, dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )  # fmt: skip
        self._step, self._total, self._description = done, total, description

    def step(self, units: int) -> None:
        """Counts one step, of so many units."""
        self._step += 1
        self._units += units
        self.speed = self._units / max(time.perf_counter() - self._started, 1e-9)
        self._bar.update()

    def show(self, loss: float) -> None:
        """Shows a loss beside what was counted."""
        text = f"loss {loss:.4f}, {self.speed:,.0f} {self.unit}/s"
        self._bar.set_postfix_str(text, refresh=False)
        now = time.perf_counter()
        if self._bar.disable and now - self._printed > SECONDS_BETWEEN_LINES:
            self._printed = now
            print(f"{self._description}: step {self._step} of {self._total}, {text}", flush=True)

    def close(self) -> None:
        self._bar.close()
