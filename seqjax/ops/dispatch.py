"""Which implementation runs a cell over a whole sequence."""

from collections.abc import Mapping

import jax

IMPLEMENTATIONS = ("scan", "xla")
"""The names that `implementation` may have, besides None."""

PREFERRED = ("xla", "scan")
"""The best first: None takes the first that applies."""


def check_implementation(name: str | None) -> None:
    """Raises ValueError unless `name` is None or one of `IMPLEMENTATIONS`."""
    if name is not None and name not in IMPLEMENTATIONS:
        known = ", ".join(repr(known) for known in IMPLEMENTATIONS)
        raise ValueError(f"unknown implementation {name!r}: expected None (choose) or {known}")


def choose_implementation(name: str | None, why_not: Mapping[str, str | None]) -> str:
    """The implementation called `name`; `None` picks the best that applies.

    Args:
      name: one of `IMPLEMENTATIONS`, or None.
      why_not: the reason why an implementation does not apply; of the others there is none.

    Raises:
      ValueError: no implementation has that name, or it does not apply here.
    """
    check_implementation(name)
    if name is None:
        return next(known for known in PREFERRED if not why_not.get(known))
    if reason := why_not.get(name):
        raise ValueError(f"implementation {name!r} does not apply: {reason}. Use None or 'scan'")
    return name


def why_not_xla(xs: jax.Array) -> str | None:
    """Why "xla" does not apply to these inputs, `(T, *batch, features)`; None if it does."""
    if isinstance(xs.shape[0], int):
        return None
    return f"it needs a known number of steps, got a symbolic one: {xs.shape[0]}"
