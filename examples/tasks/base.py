"""What a task is: batches to learn from, a measure, settings, and the published figures."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp


class Batch(NamedTuple):
    """Sequences, time-major as in `seqjax.scan`, and what should be said at their steps."""

    inputs: jax.Array  # (T, batch, features)
    targets: jax.Array  # (T, batch): class numbers, or floats to come close to
    counts: jax.Array  # (T, batch), bool: where the target counts
    mask: jax.Array | None = None  # (T, batch), bool: the valid steps; None means all


# Inputs and mask to outputs, with trained parameters.
Predict = Callable[[jax.Array, jax.Array | None], jax.Array]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
      steps: updates at most.
      batch_size: sequences per update.
      hidden_size: of the one recurrent layer.
      learning_rate: of Adam, at the start; it falls to 0 along a cosine over `steps`.
      clip: the norm that the gradient over all parameters is cut to.
      solved_loss: training ends early when the mean loss of a chunk is below.
      chunk: updates per compiled call, and per point of the curve.
    """

    steps: int
    batch_size: int = 32
    hidden_size: int = 130
    learning_rate: float = 1e-3
    clip: float = 1.0
    solved_loss: float = 0.0
    chunk: int = 50


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """A task. Frozen: its fields say how hard it is, and two alike compile once.

    Attributes:
      name: for the command line.
      measure: what is compared with the published figures, its unit included.
      published: cell to the published figure.
      published_steps: updates that the published runs took, as far as they are known.
      source: where the figures stand.
      outputs: numbers said at each step: the classes, or 1.
      seeds: how many a full run takes.
      settings: cell to how it is trained.
    """

    name: ClassVar[str]
    measure: ClassVar[str]
    published: ClassVar[dict[str, str]]
    published_steps: ClassVar[str]
    source: ClassVar[str]
    outputs: ClassVar[int]
    seeds: ClassVar[int]
    settings: ClassVar[dict[str, Settings]]

    @property
    @abc.abstractmethod
    def title(self) -> str:
        """For table and plot: the task and how hard it is."""

    @abc.abstractmethod
    def smoke(self) -> Self:
        """The task made small, for a run of seconds."""

    def describe(self) -> dict[str, Any]:
        """What a result depends on, to be written beside it."""
        return dataclasses.asdict(self)

    def load(self, seed: int) -> Any:
        """Arrays to train on, where batches are not made from nothing."""
        return None

    @abc.abstractmethod
    def sample(self, key: jax.Array, data: Any, batch_size: int) -> Batch:
        """A batch to train on. Compiled into the training loop."""

    @abc.abstractmethod
    def evaluate(self, predict: Predict, seed: int) -> dict[str, float]:
        """Measures on sequences that were not trained on; `measure` comes first."""

    def baseline(self) -> float | None:
        """The loss of the best that knows nothing of the inputs, for the plot."""
        return None


def last_step(like: jax.Array) -> jax.Array:
    """`(T, batch)` of bool, true at the last step: for tasks with one answer per sequence."""
    return jnp.zeros(like.shape[:2], bool).at[-1].set(True)


def test_key(seed: int) -> jax.Array:
    """Draws test sequences: of another stream than the training's."""
    return jax.random.fold_in(jax.random.key(seed), 0x7E57)
