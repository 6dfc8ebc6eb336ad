"""Options that every example has, and types for options of its own."""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp


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
        help="folder to write results to (default: "
        f"{default_out(parser.prog)}, followed by -smoke with --smoke)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "float64"],
        default="float32",
        help="dtype to compute in; parameters are float64 with float64, else float32",
    )
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, to see it work")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of programs that train for long: checkpoints, logs and devices."""
    parser.add_argument(
        "--checkpoint-dir",
        type=_folder,
        help="keep checkpoints there, and go on from the newest one that is there already",
    )
    parser.add_argument(
        "--save-every",
        type=at_least(1),
        default=500,
        metavar="STEPS",
        help="between two checkpoints; another comes after every epoch (default: %(default)s)",
    )
    parser.add_argument("--log-dir", type=_folder, help="write TensorBoard's events there")
    parser.add_argument(
        "--devices",
        type=at_least(1),
        help="spread every batch over so many devices, of all processes (default: 1, or with "
        "--coordinator all that there are)",
    )
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="where the first of several processes can be reached; auto: ask the cluster",
    )
    parser.add_argument("--num-processes", type=at_least(1), help="how many processes there are")
    parser.add_argument("--process-id", type=at_least(0), help="which one this is, from 0")


def default_out(program: str, *modes: str) -> Path:
    """The folder that a program writes to by itself: another one for each mode that it runs in."""
    return Path("runs") / "-".join([Path(program).stem, *modes])


def configure(args: argparse.Namespace) -> DTypes:
    """Prepares the run that the common options ask for: 64-bit types and the output folder."""
    if args.out is None:
        modes = [mode for mode in ("toy", "smoke") if getattr(args, mode, False)]
        args.out = default_out(sys.argv[0], *modes)
    args.out.mkdir(parents=True, exist_ok=True)
    return dtypes(args.dtype)


def dtypes(name: str) -> DTypes:
    """The dtypes that --dtype asks for; turns 64-bit types on where they are needed."""
    if name == "float64":
        jax.config.update("jax_enable_x64", True)
    return DTypes(jnp.dtype(name), jnp.dtype("float64" if name == "float64" else "float32"))


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


def number(above: float, below: float = math.inf) -> Callable[[str], float]:
    """For `add_argument(type=…)`: a float between two bounds, the lower one included."""

    def convert(text: str) -> float:
        if not above <= (value := float(text)) < below:
            raise argparse.ArgumentTypeError(f"expected {above} <= number < {below}, got {text}")
        return value

    return convert


def _folder(text: str) -> Path:
    if (path := Path(text)).exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file, expected a folder")
    return path
