"""`python -m benchmarks.run`: measures, and writes results.json, results.md and results.png."""

import argparse
import dataclasses
import datetime
import importlib.metadata
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import peers
from benchmarks.cases import CELLS, GROUPS, Case, select
from benchmarks.peers.program import Settings
from benchmarks.process import WorkerProcess
from benchmarks.report import write_report
from benchmarks.results import DEVICES, Results, load, save, time_ratio

REST_SECONDS = 0.02
"""Between two workers' blocks: the threads of the last one spin for a moment before they sleep."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program."""
    args = _arguments(sys.argv[1:] if argv is None else argv)
    # Seqjax in another way is measured only against seqjax itself, and cores are a CPU's.
    cases = [
        case
        for case in select(args.cells, args.cases)
        if peers.VARIANTS.get(case.group, peers.BASELINE) in args.peers
        and (args.device == "cpu" or case.group != DEVICES)
    ]
    if args.list:
        print("\n".join(case.name for case in cases))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.json"
    results = start(path, args)
    done = {case["name"] for case in results["cases"]}
    try:
        measure([case for case in cases if case.name not in done], args.peers, results, path)
    except KeyboardInterrupt:
        print("interrupted: --resume measures the other cases", file=sys.stderr)
    write_report(args.out, results)
    print(f"wrote {args.out / 'results.md'}")


def measure(cases: list[Case], names: list[str], results: Results, path: Path) -> None:
    """Measures cases, adding each to the results and writing them."""
    meta = results["meta"]
    settings = Settings(**meta["settings"])
    reference = WorkerProcess(peers.REFERENCE, settings._replace(device="cpu", dtype="float64"))
    workers = [WorkerProcess(name, settings) for name in names]
    try:
        for worker in workers:
            kind, text = next(iter(worker.hello.items()))
            meta["peers"][worker.name] = text if kind == "version" else f"{kind}: {text}"
            if worker.name == peers.BASELINE and kind != "version":
                sys.exit(f"{worker.name} does not start on {settings.device}: {text}")
        with tempfile.TemporaryDirectory() as folder:
            progress = tqdm(cases, disable=not sys.stderr.isatty(), dynamic_ncols=True)
            for case in progress:
                progress.set_description(case.name)
                command = {
                    "case": dataclasses.asdict(case),
                    "dtype": settings.dtype,
                    "reference": str(Path(folder) / "reference.npz"),
                }
                present = [worker for worker in workers if peers.takes_part(worker.name, case)]
                answers = measure_case(command, meta["rounds"], reference, present)
                entry = dataclasses.asdict(case) | {"name": case.name, "peers": answers}
                results["cases"].append(entry)
                save(path, results)
                progress.write(line(entry))
    finally:
        for worker in [reference, *workers]:
            worker.close()


def measure_case(
    command: dict[str, Any], rounds: int, reference: WorkerProcess, workers: list[WorkerProcess]
) -> dict[str, Any]:
    """Each peer's answer: what preparing said, and the seconds of each round."""
    answer = reference.ask("prepare", **command, save=True)
    if "failed" in answer:
        return {worker.name: {"failed": f"reference: {answer['failed']}"} for worker in workers}
    answers = {worker.name: worker.ask("prepare", **command) for worker in workers}
    ready = [worker for worker in workers if "error" in answers[worker.name]]
    for worker in ready:
        answers[worker.name]["seconds"] = []
    for round_ in range(rounds):
        start = round_ % max(1, len(ready))  # So that nobody always comes first.
        for worker in ready[start:] + ready[:start]:
            time.sleep(REST_SECONDS)
            answer = worker.ask("time")
            if "failed" in answer:
                answers[worker.name] = answer
                ready.remove(worker)
            else:
                answers[worker.name]["seconds"].append(answer["seconds"])
    return answers


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=CELLS, help="default: all")
    parser.add_argument(
        "--cases",
        nargs="+",
        default=[],
        metavar="CASE",
        help=f"groups ({', '.join(GROUPS)}) or parts of case names; default: all",
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=peers.names(),
        default=peers.names(),
        metavar="PEER",
        help=f"of {', '.join(peers.names())}; default: all; {peers.BASELINE} always takes part",
    )
    rounds = parser.add_mutually_exclusive_group()
    rounds.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    rounds.add_argument("--quick", action="store_const", const=3, dest="rounds", help="3 rounds")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16", "float64"], default="float32"
    )
    parser.add_argument("--out", type=Path, help="folder; default: benchmarks/results/DEVICE")
    parser.add_argument(
        "--resume", action="store_true", help="skip the cases that --out has; its rounds hold"
    )
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {args.rounds}")
    try:
        select(args.cells, args.cases)
    except ValueError as error:
        parser.error(f"--cases: {error}")
    if args.out is None:
        args.out = Path("benchmarks", "results", args.device)
    if peers.BASELINE not in args.peers:
        args.peers.insert(0, peers.BASELINE)
    args.command = f"{parser.prog} {shlex.join(argv)}".strip()
    return args


def start(path: Path, args: argparse.Namespace) -> Results:
    """New results, or those to go on with."""
    # What this process may use, which can be less than the machine has.
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    settings = Settings(args.device, args.dtype, threads)._asdict()
    if args.resume and path.exists():
        results = load(path)
        before = results["meta"]["settings"]
        if before != settings:
            sys.exit(f"{path} has results of {before}, not of {settings}: choose another --out")
        return results
    meta = {
        "command": args.command,
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "rounds": args.rounds,
        "settings": settings,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("seqjax", "jax", "jaxlib")},
        "peers": {},
    }
    return {"meta": meta, "cases": []}


def _processor() -> str:
    """The CPU's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def line(entry: dict[str, Any]) -> str:
    """One line on a finished case."""
    parts = [entry["name"]]
    for name, answer in entry["peers"].items():
        if "seconds" not in answer:
            parts.append(f"{name}: {next(iter(answer.values()))}")
        elif name == peers.BASELINE:
            parts.append(f"{name} {1e3 * statistics.median(answer['seconds']):.3g} ms")
        elif theirs := time_ratio(entry, name):
            parts.append(f"{name} {theirs.median:.2f}x [{theirs.low:.2f}, {theirs.high:.2f}]")
    return "  ".join(parts)


if __name__ == "__main__":
    main()
