"""The adding problem: two of many numbers are marked, their sum is asked for at the end."""

import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from tasks.base import Batch, Predict, Settings, Task, last_step, test_key


@dataclasses.dataclass(frozen=True)
class Adding(Task):
    """Each step shows a number of [0, 1) and a mark, on in one step of each half of the sequence.

    Always saying 1, the mean of the sum, has a squared error of 1/6 on average.
    """

    length: int = 600

    name: ClassVar[str] = "adding"
    measure: ClassVar[str] = "mean squared error"
    published: ClassVar[dict[str, str]] = {"lstm": "0.164", "gru": "5.3e-5", "rnn": "0.177"}
    published_steps: ClassVar[str] = "15,625"
    source: ClassVar[str] = "Bai, Kolter, Koltun 2018 (arXiv 1803.01271), table 1"
    outputs: ClassVar[int] = 1
    seeds: ClassVar[int] = 1
    # The learning rate is that of the authors' code.
    settings: ClassVar[dict[str, Settings]] = {
        cell: Settings(steps=steps, learning_rate=4e-3, solved_loss=5e-5)
        for cell, steps in [("lstm", 2000), ("gru", 4000), ("rnn", 2000)]
    }

    @property
    def title(self) -> str:
        return f"adding problem, T={self.length}"

    def smoke(self) -> Self:
        return dataclasses.replace(self, length=20)

    def sample(self, key: jax.Array, data: Any, batch_size: int) -> Batch:
        numbers_key, *mark_keys = jax.random.split(key, 3)
        numbers = jax.random.uniform(numbers_key, (self.length, batch_size))
        half = self.length // 2
        first = jax.random.randint(mark_keys[0], (batch_size,), 0, half)
        second = jax.random.randint(mark_keys[1], (batch_size,), half, self.length)
        steps = jnp.arange(self.length)[:, None]
        marks = (steps == first[None]) | (steps == second[None])
        total = jnp.sum(numbers, axis=0, where=marks)
        inputs = jnp.stack([numbers, marks.astype(numbers.dtype)], axis=-1)
        targets = jnp.broadcast_to(total, numbers.shape)
        return Batch(inputs, targets, last_step(inputs))

    def evaluate(self, predict: Predict, seed: int) -> dict[str, float]:
        batch = self.sample(test_key(seed), None, 1000)
        errors = predict(batch.inputs, None)[-1, :, 0] - batch.targets[-1]
        return {self.measure: float(jnp.mean(errors**2))}

    def baseline(self) -> float:
        return 1 / 6
