"""Results on disk, one file per run, and the table and curves made from them."""

import dataclasses
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.base import Settings, Task

Record = dict[str, Any]


class RecordError(Exception):
    """A file of results cannot be used; the message says why and what to do."""


def describe(task: Task, settings: Settings, dtype: str) -> dict[str, Any]:
    """Everything that a result depends on, but for cell, seed and program."""
    return {**task.describe(), **dataclasses.asdict(settings), "dtype": dtype}


def path_of(folder: Path, task: str, cell: str, seed: int) -> Path:
    return folder / "runs" / f"{task}-{cell}-seed{seed}.json"


def to_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def load(path: Path) -> Record:
    """A result from a file.

    Raises:
      RecordError: it is not one.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or not {"task", "cell", "seed", "settings"} <= set(record):
            raise ValueError("it has other contents")
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} is not a result of this program ({error}). Delete it") from error
    return record


def find(path: Path, settings: dict[str, Any]) -> Record | None:
    """The result in a file, None where there is none yet.

    Raises:
      RecordError: it was made with other settings, or the file is broken.
    """
    if not path.exists():
        return None
    record = load(path)
    there = record["settings"]
    changes = [
        f"{name} {there.get(name)} there and {settings.get(name)} now"
        for name in {**there, **settings}
        if there.get(name) != settings.get(name)
    ]
    if changes:
        raise RecordError(
            f"{path} was made with other settings: {', '.join(changes)}. Give another --out, or "
            "delete it"
        )
    return record


def load_all(folder: Path, tasks: list[str], cells: list[str]) -> list[Record]:
    """All results in a folder, in the order of the table.

    Raises:
      RecordError: a file is broken.
    """
    records = [load(path) for path in (folder / "runs").glob("*.json")]
    return sorted(
        (record for record in records if record["task"] in tasks and record["cell"] in cells),
        key=lambda r: (tasks.index(r["task"]), cells.index(r["cell"]), r["seed"]),
    )


def groups(records: list[Record]) -> Iterator[tuple[str, str, list[Record]]]:
    """Task, cell and the results of all seeds."""
    for task, cell in dict.fromkeys((record["task"], record["cell"]) for record in records):
        yield task, cell, [r for r in records if (r["task"], r["cell"]) == (task, cell)]


def table(records: list[Record], tasks: dict[str, type[Task]]) -> str:
    """A Markdown table, one line per task and cell, and what its columns mean."""
    lines = [
        "| task | measure | cell | ours | published | seeds | steps | published steps | minutes "
        "| also measured |",
        f"|{' --- |' * 10}",
    ]
    for name, cell, group in groups(records):
        task = tasks[name]
        ours = {
            measure: _summary([record["measures"][measure] for record in group])
            for measure in group[0]["measures"]
        }
        cells = [
            group[0]["title"],
            task.measure,
            cell.upper(),
            ours.pop(task.measure),
            task.published.get(cell, "-"),
            str(len(group)),
            _range([record["steps"] for record in group]),
            task.published_steps,
            f"{statistics.mean(record['seconds'] for record in group) / 60:.1f}",
            ", ".join(f"{measure}: {value}" for measure, value in ours.items()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    used = dict.fromkeys(record["task"] for record in records)
    sources = [f"* {name}: {tasks[name].source}." for name in used]
    machines = sorted({f"{record['hardware']}; {record['dtype']}" for record in records})
    return "\n".join(
        [
            *lines,
            "",
            "With several seeds: their mean, and in brackets the lowest and the highest. Steps are "
            "updates, minutes those of one seed, evaluation and compilation included.",
            "",
            "Published figures:",
            "",
            *sources,
            "",
            *machines,
            "",
        ]
    )


def _summary(values: list[float]) -> str:
    low, high = _short(min(values)), _short(max(values))
    return low if low == high else f"{_short(statistics.mean(values))} ({low} to {high})"


def _short(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
