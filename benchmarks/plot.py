"""A picture of the ratios: one panel a cell, one row a case, one colour a library."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # Draws into files, so that no screen is needed.
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.cases import CELLS
from benchmarks.results import BASELINE, Results, time_ratio

TICKS = (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 50, 100)


def save_plot(path: Path, results: Results) -> None:
    """Draws each case's ratios with their quartiles; seqjax is faster to the right of the line."""
    cells = [cell for cell in CELLS if any(c["cell"] == cell for c in results["cases"])] or ["-"]
    # The panels share their rows: the cases' names but for the cell. Dictionaries keep the order.
    labels = {
        case["name"]: case["name"].replace(f"{case['cell']}-", "", 1) for case in results["cases"]
    }
    rows = {label: row for row, label in enumerate(dict.fromkeys(labels.values()))}
    peers = list(dict.fromkeys(name for case in results["cases"] for name in case["peers"]))
    peers = [name for name in peers if name != BASELINE]
    figure, axes = plt.subplots(
        1,
        len(cells),
        figsize=(2.5 + 4.2 * len(cells), 1.5 + 0.25 * len(rows)),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    for axis, cell in zip(axes[0], cells, strict=True):
        for row in range(0, len(rows), 2):
            axis.axhspan(row - 0.5, row + 0.5, color="0.95", linewidth=0)
        for index, peer in enumerate(peers):
            colour = plt.colormaps["tab20"](index)
            # A little apart, so that none hides another; drawn once empty, for the legend.
            offset = 0.6 * ((index + 0.5) / len(peers) - 0.5)
            axis.plot([], [], "o", color=colour, markersize=4, label=peer)
            for case in results["cases"]:
                ratio = time_ratio(case, peer)
                if case["cell"] != cell or ratio is None:
                    continue
                y = rows[labels[case["name"]]] + offset
                axis.plot([ratio.low, ratio.high], [y, y], color=colour, linewidth=1.2, alpha=0.7)
                axis.plot(ratio.median, y, "o", color=colour, markersize=4)
        axis.axvline(1, color="black", linewidth=1)
        axis.set(xscale="log", title=cell, ylim=(len(rows) - 0.5, -0.5))
        axis.set_yticks(range(len(rows)), list(rows))
        axis.xaxis.set_major_locator(FixedLocator(TICKS))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", alpha=0.3)
    figure.supxlabel("time by seqjax's time (log scale): right of 1, seqjax is faster", fontsize=9)
    handles, names = axes[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside upper center", ncols=min(len(handles), 6))
    figure.savefig(path, dpi=130)
    plt.close(figure)
