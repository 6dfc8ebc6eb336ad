"""The embedded Reber grammar: what may follow, and a symbol to remember from start to end."""

import dataclasses
import itertools
from collections.abc import Collection
from typing import ClassVar, Self

import jax
import numpy as np

import seqjax
from tasks.base import Batch, Predict, Settings, Task

SYMBOLS = "BTPSXVE"

# State to the symbols that may follow and the states that they lead to; state 7 is the end.
REBER = (
    {"B": 1}, {"T": 2, "P": 3}, {"S": 2, "X": 4}, {"T": 3, "V": 5},
    {"X": 3, "S": 6}, {"P": 4, "V": 6}, {"E": 7},
)  # fmt: skip


def embedded_string(rng: np.random.Generator) -> str:
    """A string of the grammar: B, then T or P, a string of the inner grammar, the T or P, E."""
    state, inner = 0, ""
    while state < len(REBER):
        symbol = str(rng.choice(list(REBER[state])))
        inner, state = inner + symbol, REBER[state][symbol]
    branch = str(rng.choice(["T", "P"]))
    return f"B{branch}{inner}{branch}E"


def legal_successors(string: str) -> list[set[str]]:
    """What may follow each symbol of a string of the embedded grammar but the last.

    Raises:
      ValueError: it is not a string of the grammar.
    """
    branch, inner = string[1:2], string[2:-2]
    successors = [{"T", "P"}, {"B"}]
    state = 0
    for symbol in inner:
        if state == len(REBER) or symbol not in REBER[state]:
            raise ValueError(f"not a string of the embedded Reber grammar: {string!r}")
        state = REBER[state][symbol]
        successors.append(set(REBER[state]) if state < len(REBER) else {branch})
    if state < len(REBER) or branch not in ("T", "P") or string != f"B{branch}{inner}{branch}E":
        raise ValueError(f"not a string of the embedded Reber grammar: {string!r}")
    return [*successors, {"E"}]


def draw_strings(count: int, seed: int, without: Collection[str] = ()) -> list[str]:
    """Strings of the grammar, but for some."""
    rng = np.random.default_rng(seed)
    drawn = (embedded_string(rng) for _ in itertools.count())
    return list(itertools.islice((string for string in drawn if string not in without), count))


def encode(strings: list[str]) -> Batch:
    """Strings side by side, padded: at each symbol but the last, the next one is asked for."""
    numbers = [np.array([SYMBOLS.index(symbol) for symbol in string]) for string in strings]
    padded = seqjax.pad_sequence(numbers)
    lengths = np.array([len(string) - 1 for string in strings])
    mask = np.asarray(seqjax.lengths_to_mask(lengths, len(padded) - 1))
    one_hot = np.eye(len(SYMBOLS), dtype=np.float32)[padded]
    return Batch(one_hot[:-1], padded[1:], mask, mask)


@dataclasses.dataclass(frozen=True)
class Reber(Task):
    """Predicts the next symbol of strings of the grammar.

    A test string is right when, at every step, the symbols that may follow are those ranked
    highest. Which T or P comes last but one depends on the second symbol alone.
    """

    train_strings: int = 4000
    test_strings: int = 256

    name: ClassVar[str] = "reber"
    measure: ClassVar[str] = "test strings wholly right (%)"
    published: ClassVar[dict[str, str]] = {"lstm": "100", "gru": "-", "rnn": "0"}
    published_steps: ClassVar[str] = "8,440 to 39,740 strings"
    source: ClassVar[str] = "Hochreiter, Schmidhuber 1997, table 1"
    outputs: ClassVar[int] = len(SYMBOLS)
    seeds: ClassVar[int] = 3
    settings: ClassVar[dict[str, Settings]] = dict.fromkeys(
        ("lstm", "gru", "rnn"), Settings(steps=4000, hidden_size=16, learning_rate=1e-2)
    )

    @property
    def title(self) -> str:
        return f"embedded Reber grammar, {self.train_strings} training strings"

    def smoke(self) -> Self:
        return dataclasses.replace(self, train_strings=32, test_strings=8)

    def training_strings(self, seed: int) -> list[str]:
        return draw_strings(self.train_strings, seed)

    def load(self, seed: int) -> Batch:
        return encode(self.training_strings(seed))

    def sample(self, key: jax.Array, data: Batch, batch_size: int) -> Batch:
        chosen = jax.random.randint(key, (batch_size,), 0, self.train_strings)
        return jax.tree.map(lambda array: array[:, chosen], data)

    def evaluate(self, predict: Predict, seed: int) -> dict[str, float]:
        known = set(self.training_strings(seed))
        strings = draw_strings(self.test_strings, seed + 1, without=known)
        batch = encode(strings)
        scores = np.asarray(predict(batch.inputs, batch.mask))
        right = [
            judge(scores[: len(string) - 1, row], string) for row, string in enumerate(strings)
        ]
        return {
            self.measure: 100 * float(np.mean([all(steps) for steps in right])),
            "long-range symbol right (%)": 100 * float(np.mean([steps[-2] for steps in right])),
        }


def judge(scores: np.ndarray, string: str) -> list[bool]:
    """Whether, after each symbol, the highest scores `(steps, 7)` are those of what may follow."""
    ranked = np.argsort(-scores, axis=-1)
    return [
        {SYMBOLS[number] for number in ranking[: len(legal)]} == legal
        for ranking, legal in zip(ranked, legal_successors(string), strict=True)
    ]
