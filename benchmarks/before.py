"""`python -m benchmarks.before FOLDER`: seqjax of this checkout beside that of an earlier one.

Case by case in the same run, each checkout with its own code: what a change costs or gives. Writes
results.json and results.md.
"""

import argparse
import dataclasses
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.cases import CELLS, Case, select
from benchmarks.peers import REFERENCE, VARIANTS
from benchmarks.peers.program import Settings
from benchmarks.process import ROOT, WorkerProcess
from benchmarks.report import table
from benchmarks.results import BASELINE, DEVICES, Results, save, summary, time_ratio
from benchmarks.run import line, measure_case, start

BEFORE = "before"
MEASURES = {"time": "time", "first_call": "first call", "memory": "memory", "error": "error"}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks.before", description=__doc__)
    parser.add_argument("folder", type=Path, help="a checkout of the version to compare with")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=CELLS)
    parser.add_argument("--cases", nargs="+", default=[], help="as for benchmarks.run")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--dtype", default="float32", help="default: %(default)s")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--resume", action="store_true", help="skip the cases that --out has")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/before"))
    args = parser.parse_args(argv)
    if not (args.folder / "benchmarks" / "worker.py").exists():
        parser.error(f"{args.folder} is no checkout of seqjax: it has no benchmarks/worker.py")
    args.command = f"{parser.prog} {shlex.join(argv).replace(str(args.folder), 'FOLDER')}"
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.json"
    results = start(path, args)
    done = {case["name"] for case in results["cases"]}
    try:
        cases = [case for case in select(args.cells, args.cases) if case.name not in done]
        _measure(cases, args.folder, results, path)
    except KeyboardInterrupt:
        print("interrupted: --resume measures the other cases", file=sys.stderr)
    (args.out / "results.md").write_text(markdown(results))
    print(f"wrote {args.out / 'results.md'}")


def _peer(case: Case) -> str:
    """How seqjax is used in a case."""
    return {**VARIANTS, DEVICES: f"{BASELINE}-{DEVICES}"}.get(case.group, BASELINE)


def _measure(cases: list[Case], folder: Path, results: Results, path: Path) -> None:
    settings = Settings(**results["meta"]["settings"])
    reference = WorkerProcess(REFERENCE, settings._replace(device="cpu", dtype="float64"))
    workers: dict[str, list[WorkerProcess]] = {}
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for case in tqdm(cases, disable=not sys.stderr.isatty(), dynamic_ncols=True):
                peer = _peer(case)
                if peer not in workers:
                    workers[peer] = [
                        WorkerProcess(peer, settings, name=name, folder=checkout)
                        for name, checkout in ((BASELINE, ROOT), (BEFORE, folder.resolve()))
                    ]
                command = {
                    "case": dataclasses.asdict(case),
                    "dtype": settings.dtype,
                    "reference": str(Path(scratch) / "reference.npz"),
                }
                answers = measure_case(command, results["meta"]["rounds"], reference, workers[peer])
                entry = dataclasses.asdict(case) | {"name": case.name, "peers": answers}
                results["cases"].append(entry)
                save(path, results)
                tqdm.write(line(entry))
    finally:
        for worker in [reference, *(worker for pair in workers.values() for worker in pair)]:
            worker.close()


def markdown(results: Results) -> str:
    """Means by group, cell and mode, then each case."""
    kinds: dict[tuple[str, str, str], list[Any]] = {}
    for case in results["cases"]:
        kinds.setdefault((case["group"], case["cell"], case["mode"]), []).append(case)

    def means() -> Iterable[list[str]]:
        for kind, cases in kinds.items():
            found = [summary(cases, BEFORE, measure) for measure in MEASURES]
            numbers = [f"{s.mean:.2f} ({s.smallest:.2f})" if s else "-" for s in found]
            yield [*kind, str(len(cases)), *numbers]

    def rows() -> Iterable[list[str]]:
        for case in results["cases"]:
            before, now = (case["peers"][name] for name in (BEFORE, BASELINE))
            ratio = time_ratio(case, BEFORE)
            if ratio is None:
                yield [case["name"], *["-"] * 5]
                continue
            times = [f"{1e3 * statistics.median(a['seconds']):.3g}" for a in (before, now)]
            spread = f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
            others = [f"{before[key]:.2g} / {now[key]:.2g}" for key in ("first_call", "error")]
            yield [case["name"], *times, spread, *others]

    meta = results["meta"]
    return "\n".join(
        [
            "# Before and after",
            "",
            f"{meta['processor']}, {meta['settings']['threads']} threads; {meta['rounds']} rounds; "
            f"{meta['date']}. `{meta['command']}`",
            "",
            "What was needed before by what is needed now, above 1 where now is better: geometric "
            "mean of the cases (smallest single ratio).",
            "",
            *table(["group", "cell", "mode", "cases", *MEASURES.values()], means()),
            "",
            "Times in ms, first calls in s; before / now.",
            "",
            *table(["case", "before", "now", "ratio", "first call", "error"], rows()),
            "",
        ]
    )


if __name__ == "__main__":
    main()
