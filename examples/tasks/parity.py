"""Parity: whether a string of bits has an odd number of ones, at lengths never trained on."""

import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

import seqjax
from tasks.base import Batch, Predict, Settings, Task, test_key


@dataclasses.dataclass(frozen=True)
class Parity(Task):
    """Bits of random lengths up to `train_length`, tested on `train_length` to `test_length`.

    Training asks for the parity of the bits so far at every step, which is following a state of
    one bit; the test asks for it at the last step.
    """

    train_length: int = 40
    test_length: int = 256
    every_step: bool = True

    name: ClassVar[str] = "parity"
    measure: ClassVar[str] = "accuracy (%)"
    published: ClassVar[dict[str, str]] = {"lstm": "100", "gru": "-", "rnn": "100"}
    published_steps: ClassVar[str] = "-"
    source: ClassVar[str] = "Grazzi et al. 2024 (arXiv 2411.12537)"
    outputs: ClassVar[int] = 2
    seeds: ClassVar[int] = 3
    settings: ClassVar[dict[str, Settings]] = dict.fromkeys(
        ("lstm", "gru", "rnn"),
        Settings(steps=4000, hidden_size=64, batch_size=64, learning_rate=3e-3, solved_loss=1e-4),
    )

    @property
    def title(self) -> str:
        return f"parity, trained to length {self.train_length}, tested to {self.test_length}"

    def smoke(self) -> Self:
        return dataclasses.replace(self, train_length=8, test_length=16)

    def sample(self, key: jax.Array, data: Any, batch_size: int) -> Batch:
        return self.draw(key, batch_size, 1, self.train_length)

    def draw(self, key: jax.Array, batch_size: int, shortest: int, longest: int) -> Batch:
        """Strings of lengths drawn from `shortest` to `longest`, both included."""
        bits_key, lengths_key = jax.random.split(key)
        bits = jax.random.randint(bits_key, (longest, batch_size), 0, 2)
        lengths = jax.random.randint(lengths_key, (batch_size,), shortest, longest + 1)
        mask = seqjax.lengths_to_mask(lengths, longest)
        counts = mask if self.every_step else jnp.arange(longest)[:, None] == lengths[None] - 1
        return Batch(jax.nn.one_hot(bits, 2), jnp.cumsum(bits, axis=0) % 2, counts, mask)

    def evaluate(self, predict: Predict, seed: int) -> dict[str, float]:
        batch = self.draw(test_key(seed), 2048, self.train_length, self.test_length)
        right = predict(batch.inputs, batch.mask).argmax(-1) == batch.targets
        lengths = np.asarray(seqjax.mask_to_lengths(batch.mask))
        right = np.asarray(right)[lengths - 1, np.arange(len(lengths))]
        longest = lengths >= np.quantile(lengths, 0.9)
        return {
            self.measure: 100 * float(np.mean(right)),
            "accuracy on the longest tenth (%)": 100 * float(np.mean(right[longest])),
        }
