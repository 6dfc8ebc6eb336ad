"""`python -m benchmarks.worker PEER …`: one peer in a process of its own.

Reads commands as lines of JSON from its input and answers each with one on its output:
`prepare` builds a case, `time` times a block of calls of it.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import Case
from benchmarks.data import largest_error, make_data
from benchmarks.peers import load
from benchmarks.peers.program import Peer, Program, Settings

BLOCK_SECONDS = 0.15
MIN_CALLS = 3


class Worker:
    """Answers commands about one peer."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.case: Case
        self.program: Program | None = None
        self.calls = MIN_CALLS

    def prepare(
        self, case: dict[str, Any], dtype: str, reference: str, *, save: bool = False
    ) -> dict[str, Any]:
        """Builds, compiles and warms up a case.

        Args:
          case: fields of the `Case`.
          dtype: the values that the data may have, whatever the worker computes in.
          reference: .npz file of the right values.
          save: write that file, and no more, for being the reference itself.
        """
        self.program = None  # Frees the last case's arrays before the next one's are made.
        self.peer.clear()
        self.case = Case(**case)
        if reason := self.peer.unsupported(self.case):
            return {"missing": reason}
        program = self.peer.program(self.case, make_data(self.case, dtype))
        if save:
            np.savez(reference, *program.values())
            return {}
        resident = _reset_peak()
        program.call()
        peak = _peak()
        with np.load(reference) as arrays:
            expected = list(arrays.values())
        answer = {
            "first_call": program.first_call,
            "memory": program.memory,
            "peak": None if peak is None else peak - resident,
            "error": "other equation"
            if self.peer.other_equation(self.case)
            else largest_error(program.values(), expected),
        }
        self.program = program
        seconds = _time_call(program)
        warm_up_until = time.perf_counter() + BLOCK_SECONDS
        while time.perf_counter() < warm_up_until:
            seconds = min(seconds, _time_call(program))
        self.calls = max(MIN_CALLS, round(BLOCK_SECONDS / seconds))
        return answer

    def time(self) -> dict[str, Any]:
        """The median of a block of calls, in seconds; of one step where the mode is "step"."""
        seconds = statistics.median(_time_call(self.program) for _ in range(self.calls))
        return {"seconds": seconds / (self.case.time if self.case.mode == "step" else 1)}


def _time_call(program: Program) -> float:
    start = time.perf_counter()
    program.call()
    return time.perf_counter() - start


def _reset_peak() -> int | None:
    """Sets the peak of resident memory back to the present size, in bytes, and returns that.

    None where the system does not offer it; only Linux does.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _peak()


def _peak() -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Serves until its input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer")
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()

    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # What libraries print is no answer.

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")

    try:
        peer = load(args.peer, Settings(args.device, args.dtype, args.threads))
    except ImportError as error:
        answer({"missing": f"not installed: {error}"})
        return
    except Exception as error:
        answer({"failed": f"{type(error).__name__}: {error}"})
        return
    worker = Worker(peer)
    answer({"version": importlib.metadata.version(peer.distribution)})
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer(getattr(worker, command.pop("do"))(**command))
        except Exception as error:
            answer({"failed": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
