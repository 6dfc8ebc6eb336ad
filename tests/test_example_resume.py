"""Training programs that are killed, stopped or find broken files end as if nothing had been."""

import os
import shutil
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import programs
import pytest

sys.path.insert(0, programs.EXAMPLES)
from common import checkpoints

OPTIONS = {
    "mnist_rows": ["--smoke", "--hidden-size=8", "--batch-size=128"],
    "language_model": ["--smoke", "--hidden-size=8", "--bptt=100", "--dropout=0.2"],
}
OPTIONS["language_model"] += ["--schedule=constant"]  # No matter how many epochs there are.
KILLS = 5
# Ctrl-C, and what a cluster sends before it takes a machine away.
SIGNALS = {"mnist_rows": signal.SIGINT, "language_model": signal.SIGTERM}


class Program:
    """One of the programs with one folder of checkpoints, started again and again."""

    def __init__(self, name: str, folder: Path, cache: Path) -> None:
        self.name, self.folder, self.cache = name, folder, cache
        self.output = folder / "output.txt"
        self.checkpoints = folder / "checkpoints"

    def start(self, *more: str) -> BaseProcess:
        self.folder.mkdir(exist_ok=True)
        argv = [
            *OPTIONS[self.name],
            *[f"--out={self.folder}", f"--checkpoint-dir={self.checkpoints}", "--save-every=1"],
            *more,
        ]
        return programs.start(self.name, argv, output=self.output, cache=self.cache)

    def run(self, *more: str, status: int = 0) -> str:
        return programs.finish(self.start(*more), self.output, status)

    def files(self) -> set[str]:
        last = self.checkpoints / "last"
        return set(os.listdir(last)) if last.exists() else set()

    def wait_for_a_checkpoint(self, process: BaseProcess) -> None:
        before = self.files()
        while process.is_alive() and not any(name.isdigit() for name in self.files() - before):
            time.sleep(0.001)
        assert process.is_alive(), self.output.read_text()

    def end(self) -> checkpoints.Checkpoint:
        """The newest checkpoint: weights, optimizer, position, losses."""
        kept = checkpoints.Checkpoints(self.checkpoints / "last")
        found = kept.restore()
        kept.close()
        return found


def assert_identical(got: checkpoints.Checkpoint, expected: checkpoints.Checkpoint) -> None:
    assert got.notes == expected.notes
    assert len(got.arrays) == len(expected.arrays)
    for one, other in zip(got.arrays, expected.arrays, strict=True):
        assert one.dtype == other.dtype
        assert one.tobytes() == other.tobytes()


@pytest.fixture(scope="module", params=OPTIONS)
def undisturbed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Program:
    folder = tmp_path_factory.mktemp(request.param)
    program = Program(request.param, folder / "undisturbed", folder / "cache")
    program.run()
    return program


@pytest.fixture
def program(undisturbed: Program, tmp_path: Path) -> Program:
    return Program(undisturbed.name, tmp_path / "run", undisturbed.cache)


def test_killed_at_random_moments(undisturbed: Program, program: Program) -> None:
    """SIGKILL five times, the first one while a checkpoint is being written."""
    rng = np.random.default_rng()
    for kill in range(KILLS):
        process = program.start()
        program.wait_for_a_checkpoint(process)
        if kill == 0:
            while not (unfinished := [name for name in program.files() if "tmp" in name]):
                assert process.is_alive()
        else:
            time.sleep(rng.uniform(0, 0.15))
        assert process.is_alive(), "it ended before it could be killed: give it more to do"
        process.kill()
        process.join()
        if kill == 0:
            assert program.files() & set(unfinished), "the write came to its end"
    printed = program.run()
    assert "going on from epoch" in printed
    assert_identical(program.end(), undisturbed.end())
    assert not [name for name in program.files() if "tmp" in name]
    assert len(program.files()) == 3


def test_stopped(undisturbed: Program, program: Program) -> None:
    """Ctrl-C saves and says so; the same command ends as if it had not been pressed."""
    number = SIGNALS[program.name]
    process = program.start()
    program.wait_for_a_checkpoint(process)
    os.kill(process.pid, number)
    printed = programs.finish(process, program.output, status=128 + number)
    assert f"saved to {program.checkpoints}: the same command goes on from there" in printed
    assert "Traceback" not in printed
    program.run()
    assert_identical(program.end(), undisturbed.end())


def test_finished_run_says_the_same_again(undisturbed: Program) -> None:
    first = undisturbed.output.read_text().splitlines()[-1]
    end = undisturbed.end()
    again = undisturbed.run()
    assert "going on from its end" in again
    assert again.splitlines()[-1].partition(" in ")[0] == first.partition(" in ")[0]
    assert_identical(undisturbed.end(), end)


def test_finished_run_goes_on_with_more_epochs(undisturbed: Program, program: Program) -> None:
    found = f"found in {program.checkpoints}, --epochs:"
    if program.name == "language_model":
        program.run("--epochs=1")
        assert f"going on from epoch 2, step 0, {found} 1 there, 2 here\n" in program.run()
        assert_identical(program.end(), undisturbed.end())
        return
    # Its learning rate falls until the last epoch, which is another one now.
    shutil.copytree(undisturbed.checkpoints, program.checkpoints)
    *_, newest = sorted(map(int, program.files()))
    damage(program.checkpoints / "last" / str(newest))
    printed = program.run("--epochs=3")
    assert f"checkpoint {newest} in {program.checkpoints / 'last'} is damaged" in printed
    assert f"going on from epoch 2, step 3, {found} 2 there, 3 here\n" in printed
    assert "Traceback" not in printed
    assert program.end().notes["epoch"] == 4
    assert len(program.end().notes["curves"]["loss"]["test"]) == 3


def test_only_damaged_checkpoints(undisturbed: Program, program: Program) -> None:
    """What is said of them is said by the program, not by a traceback."""
    shutil.copytree(undisturbed.checkpoints, program.checkpoints)
    for step in program.files():
        damage(program.checkpoints / "last" / step)
    printed = program.run(status=2)
    assert f"error: all checkpoints in {program.checkpoints / 'last'} are damaged" in printed
    assert "Traceback" not in printed


def damage(step: Path) -> None:
    for file in (step / "arrays").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
