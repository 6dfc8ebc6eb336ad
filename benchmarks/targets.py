"""What seqjax sets out to reach, and whether results show it."""

from typing import Any, NamedTuple

from benchmarks.cases import CELLS
from benchmarks.results import Results, Summary, summary


class Target(NamedTuple):
    """A bound on ratios, peer by seqjax, of some cases.

    Attributes:
      group: of the cases.
      cell: of the cases; None means all.
      mode: of the cases; None means all.
      peer: whom seqjax is compared with.
      bound: the ratio to reach, or not to exceed where `at_most`.
      measure: "time", "first_call", "memory" or "error".
      each: whether every case has to reach it; else their geometric mean.
      at_most: for seqjax against itself, used in another way: that may cost no more than this.
    """

    group: str
    cell: str | None
    mode: str | None
    peer: str
    bound: float
    measure: str = "time"
    each: bool = False
    at_most: bool = False

    def covers(self, case: dict[str, Any]) -> bool:
        """Whether a case of results counts."""
        return (
            case["group"] == self.group
            and self.cell in (None, case["cell"])
            and self.mode in (None, case["mode"])
        )

    def summary(self, results: Results) -> Summary | None:
        """What results have on it; None: nothing."""
        return summary(filter(self.covers, results["cases"]), self.peer, self.measure)

    def floor(self, results: Results) -> float | None:
        """What times would give if seqjax took no longer than the floor; None: not measured."""
        if self.measure != "time" or self.at_most:
            return None
        best = summary(filter(self.covers, results["cases"]), self.peer, "floor")
        return best and (best.smallest if self.each else best.mean)

    def holds(self, measured: Summary) -> bool:
        """Whether the results reach it."""
        if self.at_most:
            return (measured.largest if self.each else measured.mean) <= self.bound
        return (measured.smallest if self.each else measured.mean) >= self.bound


def _targets() -> list[Target]:
    targets = []
    for peer, bounds in {
        "torch": {"LSTM": (1.0, 1.1), "GRU": (1.6, 2.0), "RNN": (2.0, 2.5)},
        "flax": {"LSTM": (1.2, 1.5), "GRU": (1.3, 1.5), "RNN": (1.2, 1.4)},
    }.items():
        for cell, (forward, train) in bounds.items():
            for group in ("layer", "devices"):
                targets.append(Target(group, cell, "forward", peer, forward))
                targets.append(Target(group, cell, "train", peer, train))
    targets += [
        Target("layer", None, None, "torch", 0.75, each=True),
        Target("layer", None, None, "flax", 1.0, each=True),
        Target("layer", None, None, "flax", 1.0, measure="first_call"),
        # At most flax's, but for the gradient of PyTorch's second bias, which flax does not have.
        Target("layer", None, "train", "flax", 0.99, measure="memory", each=True),
        Target("layer", None, None, "torch", 1.0, measure="error"),
        Target("full_lengths", None, None, "seqjax-full-lengths", 1.05, at_most=True),
        Target("vmap", None, None, "seqjax-vmap", 1.10, at_most=True),
    ]
    for group, mode, bound in [
        ("ragged", "train", 1.2),
        ("bidirectional", "train", 1.1),
        ("decode_step", "step", 2.0),
        ("decode", "decode", 10.0),
    ]:
        targets += [Target(group, cell, mode, "torch", bound) for cell in CELLS]
    return targets


TARGETS = _targets()
