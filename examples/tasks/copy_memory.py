"""Copy memory: ten symbols, a long pause, then they are to be said again."""

import dataclasses
import math
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import optax

from tasks.base import Batch, Predict, Settings, Task, test_key

BLANK, MARK = 0, 9  # Symbols 1 to 8 lie between.
SYMBOLS = 10  # To remember.


@dataclasses.dataclass(frozen=True)
class CopyMemory(Task):
    """Ten symbols of eight kinds, blanks, then marks from `length` steps after the symbols on.

    There are `length + 20` steps. Blanks are asked for, and in the last ten steps the symbols
    again. Blanks followed by guesses, which takes no memory, have a loss of 10 ln 8 / (T + 20).
    """

    length: int = 1000

    name: ClassVar[str] = "copy"
    measure: ClassVar[str] = "cross-entropy (nats)"
    published: ClassVar[dict[str, str]] = {"lstm": "0.0204", "gru": "0.0197", "rnn": "0.0202"}
    published_steps: ClassVar[str] = "15,650"
    source: ClassVar[str] = "Bai, Kolter, Koltun 2018 (arXiv 1803.01271), table 1"
    outputs: ClassVar[int] = 10
    seeds: ClassVar[int] = 1
    settings: ClassVar[dict[str, Settings]] = dict.fromkeys(
        ("lstm", "gru", "rnn"), Settings(steps=1000, hidden_size=50, learning_rate=3e-3)
    )

    @property
    def title(self) -> str:
        return f"copy memory, T={self.length}"

    def smoke(self) -> Self:
        return dataclasses.replace(self, length=10)

    def sample(self, key: jax.Array, data: Any, batch_size: int) -> Batch:
        symbols = jax.random.randint(key, (SYMBOLS, batch_size), 1, MARK)
        blanks = jnp.full((self.length + SYMBOLS, batch_size), BLANK)
        marks = jnp.full((SYMBOLS + 1, batch_size), MARK)
        shown = jnp.concatenate([symbols, blanks[: self.length - 1], marks])
        targets = jnp.concatenate([blanks, symbols])
        return Batch(jax.nn.one_hot(shown, 10), targets, jnp.ones(targets.shape, bool))

    def evaluate(self, predict: Predict, seed: int) -> dict[str, float]:
        batch = self.sample(test_key(seed), None, 320)
        scores = predict(batch.inputs, None)
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, batch.targets)
        right = (scores.argmax(-1) == batch.targets)[-SYMBOLS:]
        return {
            self.measure: float(jnp.mean(losses)),
            "symbols copied (%)": 100 * float(jnp.mean(right)),
        }

    def baseline(self) -> float:
        return SYMBOLS * math.log(8) / (self.length + 2 * SYMBOLS)
