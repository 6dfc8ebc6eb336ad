"""Handwritten digits read row by row: scikit-learn's, or MNIST's."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import mnist_data
import numpy as np

from tasks.base import Batch, Predict, Settings, Task, last_step


@dataclasses.dataclass(frozen=True)
class Digits(Task):
    """An image is a sequence, its rows are the steps; at the last one the digit is asked for.

    Attributes:
      limit: images to train and to test on at most.
    """

    limit: int | None = None

    name: ClassVar[str] = "digits"
    measure: ClassVar[str] = "test accuracy (%)"
    published: ClassVar[dict[str, str]] = {"lstm": "98.9 on MNIST", "rnn": "98.0 on MNIST"}
    published_steps: ClassVar[str] = "9,380"
    source: ClassVar[str] = "20 epochs on MNIST's 60,000 images, tested on its 10,000"
    outputs: ClassVar[int] = 10
    seeds: ClassVar[int] = 3
    settings: ClassVar[dict[str, Settings]] = dict.fromkeys(
        ("lstm", "gru", "rnn"), Settings(steps=600, hidden_size=128, learning_rate=3e-3)
    )

    def images(self, seed: int) -> tuple[mnist_data.Images, mnist_data.Images]:
        """All images to train and to test on.

        Raises:
          mnist_data.DataError: the data cannot be used.
        """
        return mnist_data.load(None, False, None, seed)

    @property
    def title(self) -> str:
        return f"scikit-learn's digits by rows, {self.sizes()}"

    def smoke(self) -> Self:
        return dataclasses.replace(self, limit=256)

    def sizes(self) -> str:
        train, test = self.limited(0)
        return f"{len(train.labels)} to train on and {len(test.labels)} to test on"

    def limited(self, seed: int) -> list[mnist_data.Images]:
        return [
            mnist_data.Images(*(array[: self.limit] for array in half))
            for half in self.images(seed)
        ]

    def load(self, seed: int) -> Batch:
        train, _ = self.limited(seed)
        return encode(train, train)

    def sample(self, key: jax.Array, data: Batch, batch_size: int) -> Batch:
        chosen = jax.random.randint(key, (batch_size,), 0, data.inputs.shape[1])
        return jax.tree.map(lambda array: array[:, chosen], data)

    def evaluate(self, predict: Predict, seed: int) -> dict[str, float]:
        train, test = self.limited(seed)
        scores = predict(encode(test, train).inputs, None)[-1]
        return {self.measure: 100 * float(np.mean(np.asarray(scores.argmax(-1)) == test.labels))}


@dataclasses.dataclass(frozen=True)
class Mnist(Digits):
    """The same with MNIST's images.

    Attributes:
      folder, download, split: as in `mnist_data.load`.
    """

    folder: Path | None = None
    download: bool = False
    split: mnist_data.Split | None = None

    name: ClassVar[str] = "mnist"
    seeds: ClassVar[int] = 1
    published: ClassVar[dict[str, str]] = {"lstm": "98.9", "rnn": "98.0"}
    settings: ClassVar[dict[str, Settings]] = dict.fromkeys(
        ("lstm", "gru", "rnn"), Settings(steps=1250, batch_size=128, hidden_size=256)
    )

    def describe(self) -> dict[str, Any]:
        # Not the folder: where the images lie changes nothing.
        return {"limit": self.limit, "split": self.split and list(self.split)}

    @property
    def title(self) -> str:
        return f"MNIST by rows, {self.sizes()}"

    def images(self, seed: int) -> tuple[mnist_data.Images, mnist_data.Images]:
        return mnist_data.load(self.folder, self.download, self.split, seed)


def encode(images: mnist_data.Images, like: mnist_data.Images) -> Batch:
    """Rows as steps, the pixels shifted and scaled as those of `like` have mean 0, deviation 1."""
    pixels = (images.pixels - like.pixels.mean()) / like.pixels.std()
    rows = np.moveaxis(pixels, 1, 0)
    targets = np.broadcast_to(images.labels, rows.shape[:2])
    return Batch(rows, targets, np.asarray(last_step(rows)))
