"""Texts to model: where they come from, their splits, their vocabulary, and their batches.

A text is a sequence of tokens: its characters, or its words with `<eos>` at the end of a line.
"""

import importlib.util
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

LEVELS = {"char": "characters", "word": "words"}
UNKNOWN = {"char": "\ufffd", "word": "<unk>"}
END_OF_LINE = "<eos>"
SPLITS = ("train", "valid", "test")

# Plain Python files, of about one megabyte in all, that every Python from 3.11 has.
LIBRARY_MODULES = [
    *["argparse", "ast", "bdb", "collections", "configparser", "contextlib", "dataclasses", "dis"],
    *["email.message", "fractions", "functools", "heapq", "http.client", "pickle", "random"],
    *["shutil", "smtplib", "socket", "tempfile", "textwrap", "threading", "traceback"],
    *["unittest.case", "unittest.mock", "weakref"],
]


class TextError(Exception):
    """The text cannot be had or used; the message says why and what to do."""


class Splits(NamedTuple):
    """A text to train on, one to choose by and one to report on; None where there is none."""

    train: str
    valid: str
    test: str | None


class Vocabulary:
    """The tokens that a model knows, each by its number.

    Args:
      level: "char" or "word".
      tokens: in order of number; one of them is `UNKNOWN[level]`, which stands for all others.
    """

    def __init__(self, level: str, tokens: Iterable[str]) -> None:
        self.level = level
        self.tokens = tuple(tokens)
        self.numbers = {token: number for number, token in enumerate(self.tokens)}
        self.unknown = self.numbers[UNKNOWN[level]]

    @classmethod
    def of(cls, text: str, level: str, size: int | None = None) -> "Vocabulary":
        """The vocabulary of a training split.

        Args:
          text: the split.
          level: "char" or "word".
          size: how many tokens to keep at most, the most frequent ones, with the unknown one.
            None means all; but of words that occur once, where the text does not have the unknown
            word itself, none: a model has to meet it in training to expect it later.
        """
        counts = Counter(split(text, level))
        unknown = UNKNOWN[level]
        if size is None and level == "word" and unknown not in counts:
            counts = Counter({token: count for token, count in counts.items() if count > 1})
        counts[unknown] = max(counts.values(), default=0) + 1  # Never among those left out.
        return cls(level, sorted(token for token, _ in counts.most_common(size)))

    def __len__(self) -> int:
        return len(self.tokens)

    def line_end(self) -> int | None:
        """The number of the end of a line; None where the text is one line."""
        return self.numbers.get(*split("\n", self.level))

    def encode(self, text: str) -> np.ndarray:
        """The text's tokens by number, int32."""
        numbers = [self.numbers.get(token, self.unknown) for token in split(text, self.level)]
        return np.array(numbers, np.int32)

    def decode(self, numbers: Iterable[int]) -> str:
        """The text that tokens stand for."""
        tokens = [self.tokens[number] for number in numbers]
        if self.level == "char":
            return "".join(tokens)
        return re.sub(f" ?{END_OF_LINE} ?", "\n", " ".join(tokens))


def split(text: str, level: str) -> list[str]:
    """A text's tokens."""
    return list(text) if level == "char" else text.replace("\n", f" {END_OF_LINE} ").split()


def load(
    level: str,
    *,
    text: Path | None = None,
    files: tuple[Path | None, ...] = (),
    limit: int | None = None,
) -> Splits:
    """The text to model, in splits.

    Args:
      level: what it is made of, where it is Python's own: "char" takes sources, "word" prose.
      text: a UTF-8 file to split: 80 % to train on, 10 % to choose by, 10 % to report on.
      files: UTF-8 files that are the splits, the last one may be None; none means `text`.
      limit: how many characters to take of each text; None means all.
    """
    if files:
        return Splits(*(_read(path)[:limit] if path else None for path in files))
    whole = _read(text) if text else library() if level == "char" else documentation()
    whole = whole[:limit]
    first, second = len(whole) * 8 // 10, len(whole) * 9 // 10
    return Splits(whole[:first], whole[first:second], whole[second:])


def library() -> str:
    """The sources of Python's own library."""
    return "\n".join(map(_module_source, LIBRARY_MODULES))


def documentation() -> str:
    """The prose that Python's `help()` shows, about 55,000 words of its language reference."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise TextError(
            "this Python comes without its documentation: give a text of your own with --text FILE"
        ) from error
    # Topics contain one another, and what is trained on must not be there to be tested on.
    return "\n\n".join(dict.fromkeys("\n\n".join(topics.values()).split("\n\n")))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path} is not UTF-8 (byte {error.start}: {error.reason}): convert it, "
            "for example with iconv -f LATIN1 -t UTF-8"
        ) from error
    except OSError as error:
        raise TextError(f"cannot read {path} ({error.strerror}): check the path") from error


def _module_source(name: str) -> str:
    try:
        spec = importlib.util.find_spec(name)
        # Decoded, with the one end of line, and None for what is not written in Python.
        source = spec and spec.loader and spec.loader.get_source(name)
    except (ImportError, OSError):
        source = None
    if source is None:
        raise TextError(
            f"this Python comes without the source of its module {name!r}: "
            "give a text of your own with --text FILE"
        )
    return source


class Encoded(NamedTuple):
    """The splits as tokens by number, and what the numbers mean."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray | None
    vocabulary: Vocabulary

    def splits(self) -> dict[str, np.ndarray]:
        """The splits that there are, by name."""
        return {name: ids for name, ids in zip(SPLITS, self, strict=False) if ids is not None}

    def summary(self) -> str:
        """How long the splits are, and how much of them is not in the vocabulary."""
        counts = ", ".join(
            f"{name} {len(ids):,} ({np.count_nonzero(ids == self.vocabulary.unknown):,} unknown)"
            for name, ids in self.splits().items()
        )
        return f"{LEVELS[self.vocabulary.level]}: {counts}; {len(self.vocabulary):,} different ones"


def encode(
    splits: Splits, level: str, vocabulary_size: int | None, batch_size: int, bptt: int
) -> Encoded:
    """Builds the vocabulary from the training split and encodes all.

    Raises:
      TextError: the training split does not fill a chunk of `bptt` steps in `batch_size` rows, or
        another has nothing to predict.
    """
    vocabulary = Vocabulary.of(splits.train, level, vocabulary_size)
    parts = [None if part is None else vocabulary.encode(part) for part in splits]
    for name, part in zip(SPLITS, parts, strict=True):
        needed = batch_size * bptt + 1 if name == "train" else 2
        if part is not None and len(part) < needed:
            remedy = f", or lower --batch-size {batch_size} or --bptt {bptt}" if needed > 2 else ""
            raise TextError(
                f"the {name} split is too short, {len(part):,} {LEVELS[level]}: give at least "
                f"{needed:,}{remedy}"
            )
    return Encoded(*parts, vocabulary)


def chunks(ids: np.ndarray, batch_size: int, bptt: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a text into `batch_size` streams side by side, and those into chunks of `bptt` steps.

    Row b of one chunk continues in the next. What does not fill a chunk at the end is left out, so
    that all have one shape and none needs a mask, which leaves every fast path open.

    Returns:
      Inputs and the tokens that follow them, `(chunks, bptt, batch_size)`.
    """
    steps = (len(ids) - 1) // batch_size

    def cut(tokens: np.ndarray) -> np.ndarray:
        streams = tokens[: steps * batch_size].reshape(batch_size, steps).T
        return streams[: steps // bptt * bptt].reshape(-1, bptt, batch_size)

    return cut(ids[:-1]), cut(ids[1:])
