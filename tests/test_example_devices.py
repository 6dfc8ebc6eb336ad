"""Training programs on several devices, and in several processes, learn what one device learns.

Devices have to be made before JAX starts, so the checks run in processes of their own.
"""

import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import programs
from test_sharding import collectives

sys.path.insert(0, programs.EXAMPLES)
import language_model
import language_network
import language_options
import mnist_data
import mnist_rows
import optax
from common import checkpoints, devices, options
from flax import nnx

DEVICES = 8
MNIST = ["--smoke", "--hidden-size=8", "--epochs=3", "--batch-size=64"]
LANGUAGE_MODEL = ["--smoke", "--cell=gru", "--batch-size=8", "--bptt=5", "--hidden-size=8"]
LANGUAGE_MODEL += ["--sample-length=1"]


def curves(folder: Path) -> dict[str, Any]:
    """What a finished run has measured, from its newest checkpoint."""
    kept = checkpoints.Checkpoints(folder / "last")
    found = kept.restore()
    kept.close()
    return found.notes["curves"]


def assert_close(got: dict[str, Any], expected: dict[str, Any]) -> None:
    leaves = jax.tree.leaves_with_path(expected)
    assert leaves
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, want), value in zip(leaves, jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(value, want, rtol=2e-4, err_msg=jax.tree_util.keystr(path))


def check_curves(program: Any, argv: list[str], folder: Path) -> None:
    """A run on all devices measures what a run on one of them does."""
    for count in (1, DEVICES):
        kept = f"--checkpoint-dir={folder / str(count)}"
        program.main([*argv, f"--devices={count}", f"--out={folder}", kept])
    assert_close(curves(folder / str(DEVICES)), curves(folder / "1"))


def check_mnist_loop() -> None:
    """Devices meet once a training step, and not at every time step."""
    args = mnist_rows.make_parser().parse_args([*MNIST, f"--devices={DEVICES}"])
    group = devices.connect(args)
    model = mnist_rows.RowClassifier(
        "lstm", 8, 8, 1, mean=0.5, std=1.0, dtypes=options.configure(args), rngs=nnx.Rngs(0)
    )
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    train_set, _ = mnist_data.load_scikit_digits(None, 0)
    batch = group.split((train_set.pixels[:64], train_set.labels[:64]))
    step = mnist_rows.train_step
    check_loop(step.lower(model, optimizer, *batch, group=group).compile().as_text())


def check_language_model_loop() -> None:
    """With dropout, states from one chunk to the next, and two layers."""
    argv = [*LANGUAGE_MODEL, "--num-layers=2", "--dropout=0.3", f"--devices={DEVICES}"]
    _, args = language_options.parse("", argv)
    group = devices.connect(args)
    model = language_network.build(9, args, options.configure(args))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    tokens = group.split(np.ones((5, DEVICES), np.int32), axis=1)
    state = group.split_whole(model.initial_state(DEVICES), axis=1)
    step, key = language_model.train_step, jax.random.key(0)
    lowered = step.lower(model, optimizer, tokens, tokens, state, key, group=group)
    check_loop(lowered.compile().as_text())


def check_loop(program: str) -> None:
    everywhere, in_loops = collectives(program)
    assert everywhere, "no sum of gradients was found at all"
    assert not in_loops, in_loops


def main(argv: list[str]) -> None:
    """Runs in a process that has many devices."""
    folder = Path(argv[0])
    assert len(jax.devices()) == DEVICES
    check_curves(mnist_rows, MNIST, folder / "mnist")
    check_mnist_loop()
    text = folder / "text.txt"
    text.write_text("a state goes from one chunk to the next\n" * 12)
    check_curves(language_model, [*LANGUAGE_MODEL, f"--text={text}"], folder / "language_model")
    check_language_model_loop()


def test_eight_devices(tmp_path: Path) -> None:
    output = tmp_path / "output.txt"
    process = programs.start(
        "test_example_devices", [str(tmp_path)],
        output=output, cache=tmp_path / "cache", devices=DEVICES,
    )  # fmt: skip
    programs.finish(process, output)


def start_two(folder: Path, argv: list[str]) -> list[Any]:
    """Two processes of two devices each, that meet on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        programs.start(
            "mnist_rows",
            [
                *argv,
                "--devices=4",
                f"--coordinator=127.0.0.1:{port}",
                "--num-processes=2",
                f"--process-id={number}",
                f"--out={folder / str(number)}",
                # Only the first of them writes.
                f"--checkpoint-dir={folder / f'kept{number}'}",
            ],
            output=folder / f"output{number}.txt",
            cache=folder / "cache",
        )
        for number in range(2)
    ]


def test_two_processes(tmp_path: Path) -> None:
    """They learn what one device learns; asked to stop, they do at the same step, and go on."""
    output = tmp_path / "output.txt"
    argv = [*MNIST, "--save-every=2"]
    alone = [*argv, f"--checkpoint-dir={tmp_path / 'alone'}", f"--out={tmp_path}"]
    process = programs.start("mnist_rows", alone, output=output, cache=tmp_path / "cache")
    programs.finish(process, output)

    outputs = [tmp_path / f"output{number}.txt" for number in range(2)]
    both = start_two(tmp_path, argv)
    while not (tmp_path / "kept0" / "last" / "3").exists():
        assert all(process.is_alive() for process in both), outputs[0].read_text()
        time.sleep(0.01)
    os.kill(both[1].pid, signal.SIGTERM)  # The one that does not write.
    stopped = [
        programs.finish(process, output, status=128 + signal.SIGTERM)
        for process, output in zip(both, outputs, strict=True)
    ]
    assert "the same command goes on from there" in stopped[0]
    assert not (tmp_path / "kept1").exists()

    both = start_two(tmp_path, argv)
    printed = [
        programs.finish(process, output) for process, output in zip(both, outputs, strict=True)
    ]
    assert "going on from epoch" in printed[0]
    assert "test accuracy" in printed[0]
    assert "epoch" not in printed[1]
    assert not (tmp_path / "1" / "curves.png").exists()
    assert_close(curves(tmp_path / "kept0"), curves(tmp_path / "alone"))
