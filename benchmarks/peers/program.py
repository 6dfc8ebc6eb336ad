"""What a peer is, and what it makes of a case."""

import abc
from typing import NamedTuple, Protocol

import numpy as np

from benchmarks.cases import Case
from benchmarks.data import Data


class Settings(NamedTuple):
    """What all cases of a run share."""

    device: str = "cpu"  # or "gpu"
    dtype: str = "float32"
    threads: int = 1


class Program(Protocol):
    """A case, built and compiled.

    Attributes:
      first_call: seconds of the first call, or for JAX of tracing and compiling.
      memory: bytes of temporaries and results as the compiler states them; None where it does not.
    """

    first_call: float
    memory: int | None

    def call(self) -> object:
        """Runs once, to the end."""

    def values(self) -> list[np.ndarray]:
        """Results of a call, in one layout for every peer.

        forward: outputs (time, batch, features), zero at padding, then by layer and direction h,
        or h and c. train: gradients of `Data.weights`. step: the last output. decode: the tokens.
        """


class Peer(abc.ABC):
    """A library, set up for a run."""

    distribution: str
    """The package whose version the results state."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @abc.abstractmethod
    def clear(self) -> None:
        """Forgets what is compiled, so that every case starts from the same."""

    def unsupported(self, case: Case) -> str | None:
        """Why the library does not take part in a case; None: it does."""
        return None

    def other_equation(self, case: Case) -> bool:
        """Whether the library's cell computes something else, so that values cannot agree."""
        return False

    @abc.abstractmethod
    def program(self, case: Case, data: Data) -> Program:
        """Builds and compiles the case."""
