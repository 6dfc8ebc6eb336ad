"""What is measured: one `Case` a measurement, in groups. Imports nothing heavy."""

import dataclasses
from collections.abc import Callable, Sequence

CELLS = ("LSTM", "GRU", "RNN")  # RNN is the tanh one.

LAYER_SHAPES = (
    (32, 28, 28, 128),  # images read row by row
    (64, 28, 28, 256),
    (20, 35, 200, 200),  # the language models of Zaremba et al. (2014), small and medium
    (20, 35, 650, 650),
    (1, 100, 64, 128),
    (10, 20, 256, 512),
    (32, 512, 64, 64),
    (64, 100, 128, 256),
    (1, 1000, 32, 64),
    (256, 50, 64, 64),
)
BIDIRECTIONAL_SHAPES = (
    (64, 28, 28, 256),
    (20, 35, 200, 200),
    (32, 512, 64, 64),
    (64, 100, 128, 256),
)
RAGGED_SHAPES = ((32, 512, 64, 64), (64, 100, 128, 256), (20, 35, 200, 200), (64, 28, 28, 256))
VARIANT_SHAPES = ((32, 28, 28, 128), (20, 35, 200, 200), (64, 100, 128, 256), (1, 1000, 32, 64))


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
      group: what the case is part of, a key of `GROUPS`.
      cell: "LSTM", "GRU" or "RNN".
      mode: "forward" (outputs and final state of a sequence), "train" (forward, and backward to all
        weights), "step" (`time` single steps, each its own call) or "decode" (`time` tokens,
        greedily).
      batch: rows.
      time: steps.
      input_size: features of the input.
      hidden_size: features of the state.
      num_layers: layers one after the other.
      bidirectional: whether each layer runs in both directions.
      ragged: whether rows have lengths, uniform in 1..time and unsorted.
    """

    group: str
    cell: str
    mode: str
    batch: int
    time: int
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bidirectional: bool = False
    ragged: bool = False

    @property
    def name(self) -> str:
        """For example `LSTM-32x28x28x128-train`; the layer group needs no prefix."""
        sizes = f"{self.batch}x{self.time}x{self.input_size}x{self.hidden_size}"
        name = f"{self.cell}-{sizes}-{self.mode}"
        return name if self.group == "layer" else f"{self.group}-{name}"

    @property
    def num_directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def output_size(self) -> int:
        """Features of a layer's output."""
        return self.num_directions * self.hidden_size

    @property
    def input_sizes(self) -> list[int]:
        """Features of each layer's input."""
        return [self.input_size] + [self.output_size] * (self.num_layers - 1)

    @property
    def gates(self) -> int:
        """How many gates lie side by side in a weight."""
        return {"LSTM": 4, "GRU": 3, "RNN": 1}[self.cell]


def _sequences(
    group: str, cell: str, shapes: Sequence[tuple[int, int, int, int]], **options: bool | int
) -> list[Case]:
    return [
        Case(group, cell, mode, *shape, **options)
        for mode in ("forward", "train")
        for shape in shapes
    ]


GROUPS: dict[str, Callable[[str], list[Case]]] = {
    "layer": lambda cell: _sequences("layer", cell, LAYER_SHAPES),
    "bidirectional": lambda cell: _sequences(
        "bidirectional", cell, BIDIRECTIONAL_SHAPES, num_layers=2, bidirectional=True
    ),
    "ragged": lambda cell: _sequences("ragged", cell, RAGGED_SHAPES, ragged=True),
    "full_lengths": lambda cell: _sequences("full_lengths", cell, VARIANT_SHAPES),
    "vmap": lambda cell: _sequences("vmap", cell, VARIANT_SHAPES),
    "devices": lambda cell: _sequences("devices", cell, LAYER_SHAPES),
    "decode_step": lambda cell: [
        Case("decode_step", cell, "step", 1, 100, size, size) for size in (128, 256, 512)
    ],
    "decode": lambda cell: [Case("decode", cell, "decode", 1, 200, 64, 256)],
}
"""Group -> its cases for a cell."""

ALL_CASES = [case for make in GROUPS.values() for cell in CELLS for case in make(cell)]


def select(cells: Sequence[str] = (), patterns: Sequence[str] = ()) -> list[Case]:
    """The cases of these cells that are in one of the groups, or whose name has one of the parts.

    Args:
      cells: names from `CELLS`; none means all.
      patterns: groups, or parts of case names; none means all.

    Raises:
      ValueError: a pattern fits no case.
    """

    def fits(case: Case, pattern: str) -> bool:
        return case.group == pattern if pattern in GROUPS else pattern in case.name

    for pattern in patterns:
        if not any(fits(case, pattern) for case in ALL_CASES):
            raise ValueError(f"no case is in group, or has in its name, {pattern!r}: see --list")
    return [
        case
        for case in ALL_CASES
        if (not cells or case.cell in cells)
        and (not patterns or any(fits(case, pattern) for pattern in patterns))
    ]
