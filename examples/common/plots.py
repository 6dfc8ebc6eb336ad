"""Pictures that the examples draw into files."""

import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # Draws into files, so that no screen is needed.
import matplotlib.pyplot as plt
import numpy as np
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
        panel.set_yscale(_scale_of(lines.values()))
        panel.grid(alpha=0.3)
        if len(lines) > 1:
            panel.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def save_gates(
    path: Path,
    gates: Mapping[str, np.ndarray],
    *,
    title: str,
    inputs: np.ndarray | None = None,
    labels: Sequence[str] | None = None,
) -> None:
    """Draws what the gates of an LSTM do over a sequence, a row per unit and a column per step.

    Args:
      path: image file to write.
      gates: as from `gates.lstm_gates`, by name, each `(T, units)`.
      title: above the picture.
      inputs: the sequence `(T, features)`, drawn above the gates.
      labels: a text per step, to stand below; None numbers the steps.
    """
    names = {"i": "input gate", "f": "forget gate", "o": "output gate", "g": "candidate"}
    panels = {name: (np.asarray(gates[key]), key == "g") for key, name in names.items()}
    state = np.asarray(gates["c"])
    panels["state c"] = (state, True)
    # Units that are alike lie side by side: those whose state is highest at the same step.
    order = np.lexsort((state.max(0), state.argmax(0)))
    steps = len(state)
    rows = len(panels) + (inputs is not None)
    heights = [0.6] * (inputs is not None) + [1.0] * len(panels)
    figure, axes = plt.subplots(
        rows, 1, sharex=True, height_ratios=heights, layout="constrained",
        figsize=(min(16, max(6, 0.18 * steps)), 1.5 * rows),
    )  # fmt: skip
    if inputs is not None:
        axes[0].imshow(inputs.T, aspect="auto", cmap="gray_r", interpolation="nearest")
        axes[0].set(ylabel="input", yticks=[])
    for axis, (name, (values, signed)) in zip(axes[-len(panels) :], panels.items(), strict=True):
        # A state may pass 1; gates and candidate cannot.
        limit = max(1.0, float(np.abs(values).max())) if signed else 1.0
        drawn = axis.imshow(
            values[:, order].T, aspect="auto", interpolation="nearest",
            cmap="RdBu_r" if signed else "viridis", vmin=-limit if signed else 0, vmax=limit,
        )  # fmt: skip
        axis.set(ylabel=f"{name}\n(units)", yticks=[])
        figure.colorbar(drawn, ax=axis, pad=0.01)
    if labels is None:
        axes[-1].set_xlabel("step")
    else:
        upright = max(map(len, labels)) <= 2
        texts = [label.replace("$", r"\$") for label in labels]  # Between two would be a formula.
        axes[-1].set_xticks(range(steps), texts, fontsize=8, rotation=0 if upright else 90)
    figure.suptitle(title)
    with warnings.catch_warnings():
        # Of a text's characters that the font does not have, boxes are drawn.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
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
        axis.set_title(textwrap.fill(panel.title, 45), fontsize=10)
        scale = _scale_of(losses for runs in panel.runs.values() for _, losses in runs)
        axis.set(xlabel="step", ylabel="training loss", yscale=scale)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _scale_of(lines: Iterable[Sequence[float]]) -> str:
    """A logarithmic scale shows more of what falls to less than a third."""
    lines = [np.asarray(line) for line in lines]
    values = np.concatenate(lines)
    falls_far = max(line[0] for line in lines) > 3 * values.min()
    return "log" if falls_far and np.all(values > 0) else "linear"
