"""The results file, and the arithmetic on it: ratios, their spread, means.

`results.json` is `{"meta": {…}, "cases": [{fields of the Case, "name", "peers": {name: answer}}]}`.
An answer is `{"seconds": [one per round], "first_call", "memory", "peak", "error"}`, or
`{"missing": reason}`, or `{"failed": message}`.
"""

import json
import math
import os
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

BASELINE = "seqjax"
FLOOR = "floor"
"""What no program can do without: what seqjax could reach at best."""
FLAX = ("flax-linen", "flax-nnx")
"""Together they are "flax": in each case, whichever is better."""
DEVICES = "devices"
"""The group, and in it the suffix, of peers whose rows are spread over a device for each core."""
Results = dict[str, Any]


class Ratio(NamedTuple):
    """A peer's time by seqjax's, above 1 where seqjax is faster: median and quartiles."""

    median: float
    low: float
    high: float


class Summary(NamedTuple):
    """Geometric mean of several cases' ratios, with the extreme ones."""

    mean: float
    smallest: float
    smallest_case: str
    largest: float
    largest_case: str


def load(path: Path) -> Results:
    """Reads a results file."""
    return json.loads(path.read_text())


def save(path: Path, results: Results) -> None:
    """Writes a results file at once, so that an interrupted run leaves the last whole one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(part, path)


def time_ratio(case: dict[str, Any], peer: str) -> Ratio | None:
    """Ratio of times, round by round; None unless both were timed."""
    times = [case["peers"].get(name, {}).get("seconds") for name in (peer, BASELINE)]
    if not all(times):
        return None
    ratios = [theirs / ours for theirs, ours in zip(*times, strict=True)]
    if len(ratios) == 1:
        return Ratio(*ratios * 3)
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, low, high)


def ratio(case: dict[str, Any], peer: str, measure: str = "time") -> float | None:
    """What a peer needs by what seqjax needs, above 1 where seqjax is better.

    Args:
      case: an entry of `results["cases"]`.
      peer: its name; "flax" is the better of linen and nnx.
      measure: "time", "first_call", "memory" or "error". In the group "devices", time is that of
        one device or of several, whichever is less, on both sides.
    """
    if peer == "flax":
        ratios = [ratio(case, name, measure) for name in FLAX]
        return min((value for value in ratios if value is not None), default=None)
    if measure == "time":
        best, ours = _least_time(case, peer), _least_time(case, BASELINE)
        return best / ours if best and ours else None
    theirs, ours = (case["peers"].get(name, {}).get(measure) for name in (peer, BASELINE))
    numbers = isinstance(theirs, int | float) and isinstance(ours, int | float)
    return theirs / ours if numbers and theirs and ours else None


def _least_time(case: dict[str, Any], peer: str) -> float | None:
    """A peer's time by seqjax's on one device; None unless both were timed."""
    names = (peer, f"{peer}-{DEVICES}") if case["group"] == DEVICES else (peer,)
    times = (time_ratio(case, name) for name in names)
    return min((ratio.median for ratio in times if ratio), default=None)


def ratio_at_floor(case: dict[str, Any], peer: str) -> float | None:
    """A peer's time by that of the floor: what the ratio would be at best."""
    theirs, floor = ratio(case, peer), ratio(case, FLOOR)
    return theirs / floor if theirs and floor else None


def summary(
    cases: Iterable[dict[str, Any]],
    peer: str,
    measure: str = "time",
) -> Summary | None:
    """Sums up the cases that have the ratio; None if none has.

    Args:
      cases: entries of `results["cases"]`.
      peer: as for `ratio`.
      measure: as for `ratio`, or "floor" for `ratio_at_floor`.
    """

    def value_of(case: dict[str, Any]) -> float | None:
        return ratio_at_floor(case, peer) if measure == "floor" else ratio(case, peer, measure)

    pairs = [(value, case["name"]) for case in cases if (value := value_of(case))]
    if not pairs:
        return None
    mean = math.exp(statistics.fmean(math.log(value) for value, _ in pairs))
    return Summary(mean, *min(pairs), *max(pairs))
