"""What the example programs share: their common options, progress bars and curves."""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")  # Draws into files, so that no screen is needed.
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

T = TypeVar("T")


class DTypes(NamedTuple):
    """What modules take as `dtype` and `param_dtype`."""

    compute: jnp.dtype
    params: jnp.dtype


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that every example has."""
    parser.add_argument(
        "--seed", type=at_least(0), default=0, help="of everything random (default: 0)"
    )
    parser.add_argument(
        "--out",
        type=_folder,
        default=Path("runs") / Path(parser.prog).stem,
        help="folder to write results to (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "float64"],
        default="float32",
        help="dtype to compute in; parameters are float64 with float64, else float32",
    )
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, to see it work")


def configure(args: argparse.Namespace) -> DTypes:
    """Prepares the run that the common options ask for: 64-bit types and the output folder."""
    if args.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    args.out.mkdir(parents=True, exist_ok=True)
    params = "float64" if args.dtype == "float64" else "float32"
    return DTypes(jnp.dtype(args.dtype), jnp.dtype(params))


def at_least(minimum: int) -> Callable[[str], int]:
    """For `add_argument(type=…)`: an integer of at least `minimum`."""

    def integer(text: str) -> int:
        if (value := int(text)) < minimum:
            raise argparse.ArgumentTypeError(f"expected at least {minimum}, got {value}")
        return value

    return integer


def positive(text: str) -> float:
    """For `add_argument(type=…)`: a finite number above 0."""
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def progress(iterable: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """Shows a progress bar while iterating, and none where stderr is not a terminal."""
    hidden = not sys.stderr.isatty()
    return tqdm(iterable, description, total, leave=False, disable=hidden, dynamic_ncols=True)


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


def _folder(text: str) -> Path:
    if (path := Path(text)).exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file, expected a folder")
    return path
