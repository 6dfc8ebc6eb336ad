"""Pictures that the examples draw into files."""

from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # Draws into files, so that no screen is needed.
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator


def save_curves(path: Path, curves: dict[str, dict[str, list[float]]]) -> None:
    """Draws one panel per quantity, one line per name, over epochs.

    Args:
      path: image file to write.
      curves: quantity to name to one value per epoch: `{"loss": {"train": […], "test": […]}}`.
    """
    figure, panels = plt.subplots(
        1, len(curves), figsize=(4.8 * len(curves), 3.6), layout="constrained", squeeze=False
    )
    for panel, (quantity, lines) in zip(panels[0], curves.items(), strict=True):
        for name, values in lines.items():
            # With one epoch there is no line to see, so a marker.
            marker = "o" if len(values) == 1 else None
            panel.plot(range(1, len(values) + 1), values, label=name, marker=marker, clip_on=False)
        epochs = max(len(values) for values in lines.values())
        panel.set(xlabel="epoch", ylabel=quantity, xlim=(1, max(2, epochs)))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
        if len(lines) > 1:
            panel.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


class LossPanel(NamedTuple):
    """Losses to draw: per name, runs of (steps per value, values); and what no skill gives."""

    title: str
    runs: dict[str, list[tuple[int, list[float]]]]
    baseline: float | None


def save_losses(path: Path, panels: list[LossPanel]) -> None:
    """Draws training losses over steps, a panel per task, a colour per name, a line per run."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.8 * columns, 3.6 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    names = list(dict.fromkeys(name for panel in panels for name in panel.runs))
    for axis, panel in zip(axes.flat, panels, strict=False):
        for name, runs in panel.runs.items():
            color = f"C{names.index(name)}"
            for which, (chunk, losses) in enumerate(runs):
                steps = [chunk * (i + 1) for i in range(len(losses))]
                label = name if which == 0 else None
                axis.plot(steps, losses, color=color, label=label, linewidth=1)
        if panel.baseline is not None:
            axis.axhline(panel.baseline, color="black", linestyle="--", label="baseline")
        axis.set_title(panel.title, fontsize=10)
        axis.set(xlabel="step", ylabel="training loss", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
