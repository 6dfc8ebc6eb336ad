"""Which implementation runs a cell over a whole sequence."""

from collections.abc import Callable
from typing import Any

from seqjax.ops import reference

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {"scan": reference.scan}
"""Name -> function with `reference.scan`'s signature."""


def choose_implementation(name: str | None) -> Callable[..., Any]:
    """The implementation called `name`; `None` picks the best that applies.

    Raises:
      ValueError: no implementation has that name.
    """
    if name is None:
        name = "scan"
    if name not in IMPLEMENTATIONS:
        known = ", ".join(repr(known) for known in IMPLEMENTATIONS)
        raise ValueError(f"unknown implementation {name!r}: expected None (choose) or {known}")
    return IMPLEMENTATIONS[name]
