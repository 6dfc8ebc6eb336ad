"""Progress while a program runs."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(iterable: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """Shows a progress bar while iterating, and none where stderr is not a terminal."""
    hidden = not sys.stderr.isatty()
    return tqdm(iterable, description, total, leave=False, disable=hidden, dynamic_ncols=True)
