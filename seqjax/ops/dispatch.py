"""Which implementation runs a cell over a whole sequence."""

import jax

from seqjax.ops.kernel import Kernel

IMPLEMENTATIONS = ("scan", "xla")
"""The names that `implementation` may have, besides None."""


def check_implementation(name: str | None) -> None:
    """Raises ValueError unless `name` is None or one of `IMPLEMENTATIONS`."""
    if name is not None and name not in IMPLEMENTATIONS:
        known = ", ".join(repr(known) for known in IMPLEMENTATIONS)
        raise ValueError(f"unknown implementation {name!r}: expected None (choose) or {known}")


def choose_implementation(name: str | None, kernel: Kernel | None, xs: jax.Array) -> str:
    """The implementation called `name`; `None` picks the best that applies.

    Args:
      name: one of `IMPLEMENTATIONS`, or None.
      kernel: what the cell has for "xla".
      xs: the inputs, `(T, *batch, features)`.

    Raises:
      ValueError: no implementation has that name, or it does not apply here.
    """
    check_implementation(name)
    if name == "scan":
        return name
    reason = _why_not_xla(kernel, xs)
    if reason is None:
        return "xla"
    if name == "xla":
        raise ValueError(f"implementation 'xla' does not apply: {reason}. Use None or 'scan'")
    return "scan"


def _why_not_xla(kernel: Kernel | None, xs: jax.Array) -> str | None:
    if kernel is None:
        return "this cell has no kernel, as RNNCell, LSTMCell and GRUCell have"
    if not isinstance(xs.shape[0], int):
        return f"it needs a known number of steps, got a symbolic one: {xs.shape[0]}"
    if jax.sharding.get_abstract_mesh().explicit_axes:
        return "the mesh has explicit axes"
    return None
