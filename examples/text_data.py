"""What language_model.py learns: ten sequences, or a text, and how both become batches."""

import importlib.util
import math
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import seqjax

SEQUENCES = [
    [85, 14, 80, 34, 99, 20, 31, 65, 53, 86, 3, 58, 30, 4, 11, 6, 50, 71, 74, 13],
    [62, 76, 79, 66, 32],
    [93, 77, 16, 67, 46, 74, 24, 70],
    [19, 83, 88, 22, 57, 40, 75, 82, 4, 46],
    [70, 28, 30, 24, 76, 84, 92, 76, 77, 51, 7, 20, 82, 94, 57],
    [58, 13, 40, 61, 88, 18, 92, 89, 8, 14, 61, 67, 49, 59, 45, 12, 47, 5],
    [22, 5, 21, 84, 39, 6, 9, 84, 36, 59, 32, 30, 69, 70, 82, 56, 1],
    [94, 21, 79, 24, 3, 86],
    [80, 80, 33, 63, 34, 63],
    [87, 32, 79, 65, 2, 96, 43, 80, 85, 20, 41, 52, 95, 50, 35, 96, 24, 80],
]
TOY_VOCABULARY = 100
PAD = 0
# Decoding needs a token to stop at: the first that no sequence uses.
END = min(set(range(TOY_VOCABULARY)) - {PAD}.union(*SEQUENCES))

# Plain Python files, of about one megabyte in all, that every Python from 3.11 has.
LIBRARY_MODULES = [
    *["argparse", "ast", "bdb", "collections", "configparser", "contextlib", "dataclasses", "dis"],
    *["email.message", "fractions", "functools", "heapq", "http.client", "pickle", "random"],
    *["shutil", "smtplib", "socket", "tempfile", "textwrap", "threading", "traceback"],
    *["unittest.case", "unittest.mock", "weakref"],
]


def toy_batch() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Padded inputs, targets and mask `(T, batch)`; each target is the next token, or the end."""
    inputs = [np.array(sequence, np.int32) for sequence in SEQUENCES]
    targets = [np.array([*sequence[1:], END], np.int32) for sequence in SEQUENCES]
    lengths = [len(sequence) for sequence in SEQUENCES]
    return (
        seqjax.pad_sequence(inputs, padding_value=PAD),
        seqjax.pad_sequence(targets, padding_value=PAD),
        seqjax.lengths_to_mask(lengths, max(lengths)),
    )


class TextError(Exception):
    """The text cannot be had or used; the message says why and what to do."""


class Chunks(NamedTuple):
    """A text as equally shaped pieces `(chunks, bptt, batch)`: row b of one continues in the next.

    Targets are the characters that follow the inputs. The mask is off where a stream has ended,
    which is in the last piece only.
    """

    inputs: np.ndarray
    targets: np.ndarray
    mask: np.ndarray


def load(path: Path | None, limit: int | None, batch_size: int, bptt: int) -> str:
    """A text: that in a UTF-8 file, or the sources of Python's own library.

    Args:
      path: the file; None means `LIBRARY_MODULES`, one after the other.
      limit: how many characters to take; None means all.
      batch_size: the text has to fill so many streams with a chunk each,
      bptt: and so many characters a chunk.
    """
    if path is None:
        text = "\n".join(_module_source(name) for name in LIBRARY_MODULES)
    else:
        text = _file_text(path)
    text = text[:limit]
    # A tenth is held out, and the last character of the rest is only a target.
    needed = max(20, math.ceil((batch_size * bptt + 1) * 10 / 9))
    if len(text) < needed:
        raise TextError(
            f"{path or 'the library'} is too short, {len(text):,} characters: give at least "
            f"{needed:,}, or lower --batch-size {batch_size} or --bptt {bptt}"
        )
    return text


def _file_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path} is not UTF-8 (byte {error.start}: {error.reason}): convert it, "
            "for example with iconv -f LATIN1 -t UTF-8"
        ) from error
    except OSError as error:
        raise TextError(f"cannot read {path} ({error.strerror}): check --text") from error


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


def encode(text: str) -> tuple[np.ndarray, str]:
    """Each character's number, int32, and the vocabulary: the characters in order of number.

    Being that of the whole text, the vocabulary has every character that is held out.
    """
    vocabulary = "".join(sorted(set(text)))
    number = {character: index for index, character in enumerate(vocabulary)}
    return np.array([number[character] for character in text], np.int32), vocabulary


def into_chunks(ids: np.ndarray, batch_size: int, bptt: int) -> Chunks:
    """Cuts a text into `batch_size` streams side by side, and those into chunks of `bptt` steps.

    Every character but the first is a target exactly once.
    """
    inputs, targets = (np.array_split(part, batch_size) for part in (ids[:-1], ids[1:]))
    lengths = np.array([len(stream) for stream in inputs])
    steps = -(-lengths.max() // bptt) * bptt
    mask = seqjax.lengths_to_mask(lengths, steps)

    def cut(padded: jax.Array) -> np.ndarray:
        padded = np.pad(padded, [(0, steps - len(padded)), (0, 0)])
        return padded.reshape(-1, bptt, batch_size)

    return Chunks(cut(seqjax.pad_sequence(inputs)), cut(seqjax.pad_sequence(targets)), cut(mask))
