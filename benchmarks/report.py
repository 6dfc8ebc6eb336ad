"""`python -m benchmarks.report`: results.json as Markdown and as a picture, and the README's table.

Writes results.md and results.png beside results.json, or with --readme the table between the two
marker comments of README.md.
"""

import argparse
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plot import save_plot
from benchmarks.results import BASELINE, FLOOR, Results, load, summary, time_ratio
from benchmarks.targets import TARGETS, Target

MARKERS = ("<!-- benchmark:begin -->", "<!-- benchmark:end -->")
COLUMNS = ("torch", "flax", "flax-linen", "flax-nnx", "keras", "haiku", "equinox", FLOOR)
README_COLUMNS = ("torch", "flax", "keras", "haiku", "equinox")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Path("benchmarks/results/cpu/results.json")
    parser.add_argument(
        "results", nargs="?", type=Path, default=default, help="default: %(default)s"
    )
    parser.add_argument("--readme", action="store_true", help="rewrite README.md's table instead")
    args = parser.parse_args(argv)
    if not args.results.exists():
        parser.error(f"{args.results} does not exist: run python -m benchmarks.run first")
    results = load(args.results)
    if args.readme:
        write_readme(Path("README.md"), results)
    else:
        write_report(args.results.parent, results)


def write_report(folder: Path, results: Results) -> None:
    """Writes results.md and results.png."""
    (folder / "results.md").write_text(markdown(results))
    save_plot(folder / "results.png", results)


def write_readme(path: Path, results: Results) -> None:
    """Puts the summary between the marker comments of a Markdown file.

    Raises:
      SystemExit: the file does not have both markers, in order.
    """
    before, begin, rest = path.read_text().partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not (begin and end):
        sys.exit(f"{path}: add two lines where the table belongs, {MARKERS[0]} and {MARKERS[1]}")
    table = summary_table(results, README_COLUMNS)
    text = "\n".join([begin, "", *table, "", _machine(results), "", end])
    path.write_text(before + text + after)


def markdown(results: Results) -> str:
    """The whole report."""
    meta = results["meta"]
    lines = ["# Benchmark results", "", _machine(results), "", f"`{meta['command']}`", ""]
    lines += [f"* {name}: {version}" for name, version in meta["peers"].items()]
    lines += ["", "![Ratios](results.png)", "", "## Summary", ""]
    lines += ["Time by seqjax's time: geometric mean of the cases (smallest single ratio).", ""]
    lines += summary_table(results, COLUMNS)
    lines += ["", "## Targets", ""]
    lines += ["At the floor: if seqjax took no longer than what no program can do without.", ""]
    lines += table(
        ["target", "geometric mean", "worst case", "at the floor", "holds"],
        (_target_row(target, results) for target in TARGETS),
    )
    for title, cases in _sections(results).items():
        lines += ["", f"## {title}", ""]
        header = ["case", "peer", "ms", "ratio", "error", "first call, s", "memory", "peak growth"]
        lines += table(header, (row for case in cases for row in _case_rows(case)))
        lines += _absences(cases)
    return "\n".join(lines) + "\n"


def summary_table(results: Results, columns: Sequence[str]) -> list[str]:
    """A row for each group, cell and mode; a column for each library that has any number."""
    kinds: dict[tuple[str, str, str], list[Any]] = {}
    for case in results["cases"]:
        kinds.setdefault((case["group"], case["cell"], case["mode"]), []).append(case)
    columns = [name for name in columns if summary(results["cases"], name)]

    def rows() -> Iterable[list[str]]:
        for kind, cases in kinds.items():
            sums = [summary(cases, name) for name in columns]
            if any(sums):
                cells = [f"{s.mean:.2f} ({s.smallest:.2f})" if s else "-" for s in sums]
                yield [*kind, str(len(cases)), *cells]

    return table(["group", "cell", "mode", "cases", *columns], rows())


def _machine(results: Results) -> str:
    meta = results["meta"]
    settings = meta["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    absent = [f"{name} {why}" for name, why in meta["peers"].items() if not why[0].isdigit()]
    return (
        f"{meta['processor']}, {settings['threads']} threads; {settings['device']}, "
        f"{settings['dtype']}; {meta['rounds']} rounds; {meta['date']}; {versions}."
        + "".join(f" {reason}." for reason in absent)
    )


def _target_row(target: Target, results: Results) -> list[str]:
    kind = " ".join(part for part in (target.group, target.cell, target.mode) if part)
    relation = "≤" if target.at_most else "≥"
    each = ", each case" if target.each else ""
    text = f"{kind}: {target.measure.replace('_', ' ')}, {target.peer} / seqjax"
    text += f" {relation} {target.bound:g}{each}"
    measured = target.summary(results)
    if measured is None:
        return [text, "-", "-", "-", "not measured"]
    worst, name = measured[1:3] if not target.at_most else measured[3:5]
    holds = "yes" if target.holds(measured) else "**no**"
    floor = target.floor(results)
    best = "-" if floor is None else f"{floor:.2f}"
    return [text, f"{measured.mean:.2f}", f"{worst:.2f} ({name})", best, holds]


def _sections(results: Results) -> dict[str, list[Any]]:
    sections: dict[str, list[Any]] = {}
    for case in results["cases"]:
        sections.setdefault(f"{case['group']}, {case['cell']}", []).append(case)
    return sections


def _case_rows(case: dict[str, Any]) -> Iterable[list[str]]:
    for name, answer in case["peers"].items():
        if "seconds" not in answer:
            continue
        first = name == BASELINE
        ratio = time_ratio(case, name)
        error = answer["error"]
        yield [
            case["name"] if first else "",
            name,
            f"{1e3 * statistics.median(answer['seconds']):.3g}",
            "" if first or not ratio else f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]",
            error if isinstance(error, str) else f"{error:.1e}",
            f"{answer['first_call']:.2f}",
            _megabytes(answer["memory"]),
            _megabytes(answer["peak"]),
        ]


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.1f} MB"


def _absences(cases: list[Any]) -> list[str]:
    """Who is not in a section's table, and why."""
    reasons: dict[str, list[str]] = {}
    for case in cases:
        for name, answer in case["peers"].items():
            for kind in ("missing", "failed"):
                if kind in answer:
                    reasons.setdefault(f"{name} {kind}: {answer[kind]}", []).append(case["name"])
    lines = [
        f"* {reason}" + ("" if len(names) == len(cases) else f" ({', '.join(names)})")
        for reason, names in reasons.items()
    ]
    return ["", *lines] if lines else []


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table, line by line."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


if __name__ == "__main__":
    main()
