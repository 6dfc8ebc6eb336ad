"""Published results of RNN, LSTM and GRU, ours beside them.

    python examples/reproduce.py                          # all tasks: an hour or more on two cores
    python examples/reproduce.py --tasks parity reber     # these only
    python examples/reproduce.py --tasks mnist --data-dir mnist --download
    python examples/reproduce.py --tasks adding --steps 15625        # as long as published

Each task stands in a file of examples/tasks, with its settings and the source of the published
figures. A run is one task, cell and seed; its result is written when it ends. The same command goes
on where an interrupted one stopped, and programs with different --tasks or --cells may work side by
side into one folder. Table, JSON and learning curves are written to runs/reproduce, or to --out.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import math
import sys
from pathlib import Path
from typing import NamedTuple

import mnist_data
import tasks
from common import files, options, plots, reporting
from mnist_rows import parse_split
from tasks import learning, records
from tasks.base import Settings, Task

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        tasks.Adding, tasks.CopyMemory, tasks.Parity, tasks.Reber, tasks.Digits, tasks.Mnist
    )
}  # fmt: skip
SMOKE = {"steps": 20, "chunk": 10, "batch_size": 8, "hidden_size": 8}


class Run(NamedTuple):
    """A task, a cell and a seed, and how to train."""

    task: Task
    cell: str
    seed: int
    settings: Settings


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=TASKS,
        help="default: all, but mnist only with --data-dir or --download",
    )
    parser.add_argument(
        "--cells",
        nargs="+",
        choices=learning.CELLS,
        help="default: all, but rnn only with --smoke",
    )
    parser.add_argument(
        "--seeds",
        type=options.at_least(1),
        help="how many, --seed being the first (default: the task's own number)",
    )
    parser.add_argument(
        "--steps", type=options.at_least(1), help="updates at most (default: the task's own)"
    )
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST's IDX files")
    parser.add_argument("--download", action="store_true", help="fetch what is missing there")
    parser.add_argument(
        "--split",
        type=parse_split,
        metavar="TRAIN/TEST",
        help="use so many images of MNIST; needed where only one half of it is there",
    )
    options.add_common_arguments(parser)
    return parser


def plan(args: argparse.Namespace) -> list[Run]:
    """All runs that the options ask for, finished or not."""
    runs = []
    has_mnist = args.data_dir is not None or args.download
    for name in args.tasks or [name for name in TASKS if name != "mnist" or has_mnist]:
        fields = {}
        if name == "mnist":
            fields = {"folder": args.data_dir, "download": args.download, "split": args.split}
        task = TASKS[name](**fields)
        task = task.smoke() if args.smoke else task
        seeds = args.seeds or (1 if args.smoke else task.seeds)
        for cell in args.cells or (["rnn"] if args.smoke else learning.CELLS):
            settings = task.settings[cell]
            if args.smoke:
                settings = dataclasses.replace(settings, **SMOKE)
            if args.steps:
                chunk = math.gcd(args.steps, settings.chunk)  # So that no step is left over.
                settings = dataclasses.replace(settings, steps=args.steps, chunk=chunk)
            runs += [Run(task, cell, args.seed + i, settings) for i in range(seeds)]
    return runs


def carry_out(run: Run, folder: Path, dtype: str, dtypes: options.DTypes) -> None:
    """Trains and measures, unless that is done, and writes down what came out.

    Raises:
      records.RecordError: it was done with other settings.
      mnist_data.DataError: the images cannot be used.
      FloatingPointError: the loss is not finite.
    """
    name = f"{run.task.name} {run.cell} seed {run.seed}"
    path = records.path_of(folder, run.task.name, run.cell, run.seed)
    settings = records.describe(run.task, run.settings, dtype)
    if records.find(path, settings):
        print(f"{name}: done before", flush=True)
        return
    outcome = learning.run(run.task, run.cell, run.settings, run.seed, dtypes)
    record = {
        "task": run.task.name,
        "cell": run.cell,
        "seed": run.seed,
        "title": run.task.title,
        "settings": settings,
        **outcome._asdict(),
        "baseline": run.task.baseline(),
        "dtype": dtype,
        "hardware": reporting.hardware(),
        "date": datetime.date.today().isoformat(),
        "versions": {lib: importlib.metadata.version(lib) for lib in ("seqjax", "jax", "optax")},
    }
    files.write(path, records.to_json(record))
    measured = ", ".join(f"{measure} {value:.4g}" for measure, value in outcome.measures.items())
    print(
        f"{name}: {measured} after {outcome.steps} steps in {outcome.seconds:.0f} s "
        f"({outcome.sequences_per_second:,.0f} sequences/s)",
        flush=True,
    )


def summarize(folder: Path) -> str:
    """Writes JSON, table and curves of all results in a folder, and returns the table."""
    found = records.load_all(folder, list(TASKS), list(learning.CELLS))
    files.write(folder / "results.json", records.to_json(found))
    table = records.table(found, TASKS)
    files.write(folder / "results.md", table)
    panels = [
        plots.LossPanel(
            next(record["title"] for record in found if record["task"] == name),
            {
                cell.upper(): [(record["settings"]["chunk"], record["losses"]) for record in group]
                for task, cell, group in records.groups(found)
                if task == name
            },
            next(record["baseline"] for record in found if record["task"] == name),
        )
        for name in dict.fromkeys(record["task"] for record in found)
    ]
    plots.save_losses(folder / "curves.png", panels)
    return table


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if "mnist" in (args.tasks or []) and args.data_dir is None and not args.download:
        parser.error("--tasks mnist needs --data-dir or --download; without MNIST there is digits")
    if args.split and args.data_dir is None and not args.download:
        parser.error("--split is for MNIST: give --data-dir or --download, too")
    dtypes = options.configure(args)
    runs = plan(args)
    try:
        # All of them first: better to refuse now than in an hour.
        for run in runs:
            path = records.path_of(args.out, run.task.name, run.cell, run.seed)
            records.find(path, records.describe(run.task, run.settings, args.dtype))
        for run in runs:
            carry_out(run, args.out, args.dtype, dtypes)
        table = summarize(args.out)
    except (records.RecordError, mnist_data.DataError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        sys.exit(f"interrupted; the same command goes on from the results in {args.out}")
    print(f"\n{table}\ntable, JSON and curves are in {args.out}")


if __name__ == "__main__":
    main()
