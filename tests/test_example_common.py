"""What the example programs share: checkpoints, the course of a run, gates, pictures."""

import argparse
import gc
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import programs
import pytest
from flax import nnx

import seqjax

sys.path.insert(0, programs.EXAMPLES)
from common import checkpoints, devices, gates, options, packing, plots, reporting, training
from common.checkpoints import Checkpoint, CheckpointError, Checkpoints


def make_checkpoint(seed: int) -> Checkpoint:
    rng = np.random.default_rng(seed)
    arrays = [
        rng.normal(size=(3, 5)).astype(np.float32),
        rng.normal(size=(4,)).astype(ml_dtypes.bfloat16),
        np.array(seed, np.int32),
        np.array([-0.0, np.nan, np.inf]),
    ]
    return Checkpoint(arrays, {"epoch": seed, "losses": [rng.normal(), 1e-300]})


def assert_equal(got: Checkpoint, expected: Checkpoint) -> None:
    assert got.notes == expected.notes
    for one, other in zip(got.arrays, expected.arrays, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes()


def save(folder: Path, *steps: int) -> None:
    kept = Checkpoints(folder)
    for step in steps:
        kept.save(step, make_checkpoint(step))
    kept.close()


def restore(folder: Path) -> Checkpoint | None:
    kept = Checkpoints(folder)
    found = kept.restore()
    kept.close()
    return found


def test_checkpoints_keep_the_last_few(tmp_path: Path) -> None:
    assert restore(tmp_path) is None
    save(tmp_path, 1, 2, 3, 4, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4", "7"]
    assert_equal(restore(tmp_path), make_checkpoint(7))


def test_checkpoint_is_of_the_moment_it_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although it is written while the training goes on."""
    losses, kept = [0.5], Checkpoints(tmp_path)
    write = kept._manager.save

    def write_late(*args: object, **kwargs: object) -> None:
        losses.append(0.25)
        write(*args, **kwargs)

    monkeypatch.setattr(kept._manager, "save", write_late)
    kept.save(1, Checkpoint([np.zeros(3)], {"losses": losses}))
    kept.close()
    assert restore(tmp_path).notes == {"losses": [0.5]}


def test_checkpoint_that_is_there_stays(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    kept = Checkpoints(tmp_path)
    kept.save(2, make_checkpoint(9))
    kept.close()
    assert_equal(restore(tmp_path), make_checkpoint(2))


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    match how:
        case "flipped":
            middle = len(data) // 2
            path.write_bytes(data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :])
        case "truncated":
            path.write_bytes(data[: len(data) // 2])
        case "empty":
            path.write_bytes(b"")
        case "gone":
            path.unlink()


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty", "gone"])
def test_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture, how: str
) -> None:
    """Whichever of its files it is: what comes back is whole, and said to be older if it is."""
    save(tmp_path / "whole", 1, 2)
    files = [path for path in (tmp_path / "whole" / "2").rglob("*") if path.stat().st_size]
    files = [path.relative_to(tmp_path / "whole") for path in files if path.is_file()]
    older = 0
    for number, file in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        damage(folder / file, how)
        found = restore(folder)
        said = capsys.readouterr().err
        if found.notes["epoch"] == 1:
            older += 1
            assert said.startswith(f"checkpoint 2 in {folder} is damaged")
            assert said.count("\n") == 1  # And nothing of Orbax's.
            assert (folder / "damaged-2").is_dir()
        else:  # A file that nothing is read from.
            assert not said
        assert_equal(found, make_checkpoint(found.notes["epoch"]))
        save(folder, 2)
        assert_equal(restore(folder), make_checkpoint(2))
    assert older >= 3, f"of {files}"
    gc.collect()


def test_change_that_files_do_not_show(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """What can be read, and is not what was written, is damaged, too."""
    save(tmp_path, 1, 2)
    notes = tmp_path / "2" / "notes" / "metadata"
    text = notes.read_text()
    assert text.count("1e-300") == 1
    notes.write_text(text.replace("1e-300", "2e-300"))
    assert_equal(restore(tmp_path), make_checkpoint(1))
    assert (
        "is damaged, and damaged-2 now (its contents are not what was written)"
        in capsys.readouterr().err
    )


def test_only_damaged_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save(tmp_path, 1, 2)
    for step in ("1", "2"):
        shutil.rmtree(tmp_path / step / "arrays")
    for _ in range(2):  # Said again as often as it is tried, though they are set aside now.
        with pytest.raises(CheckpointError, match=r"all checkpoints in .* are damaged. To start"):
            restore(tmp_path)
    assert "checkpoint 1" in capsys.readouterr().err
    gc.collect()


def test_damaged_twice(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The one that is written in its place is set aside, too, and nothing is lost."""
    save(tmp_path, 1)
    for aside in ("damaged-2", "damaged-2-again", "damaged-2-again-again"):
        save(tmp_path, 2)
        damage(tmp_path / "2" / "notes" / "metadata", "empty")
        assert_equal(restore(tmp_path), make_checkpoint(1))
        assert f"is damaged, and {aside} now" in capsys.readouterr().err
    assert len(list(tmp_path.glob("damaged-*"))) == 3


def test_arrays_come_back_from_bytes() -> None:
    arrays = [*make_checkpoint(1).arrays, np.zeros((0, 3), np.int8), np.asfortranarray(np.eye(3))]
    for one, other in zip(packing.unpack(packing.pack(arrays), arrays), arrays, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def test_fingerprints_differ_where_data_does() -> None:
    data = [np.zeros((2, 3), np.float32), np.zeros(0, np.int32)]
    others = [
        [np.zeros((3, 2), np.float32), data[1]],
        [np.zeros((2, 3), np.int32), data[1]],
        [np.full((2, 3), -0.0, np.float32), data[1]],
        data[:1],
    ]
    texts = [checkpoints.fingerprint(arrays) for arrays in [data, *others]]
    assert len(set(texts)) == len(texts)
    assert texts[0] == checkpoints.fingerprint([array.copy() for array in data])


def test_configuration_is_compared(tmp_path: Path) -> None:
    configuration = {"--seed": 0, "--cell": "lstm", "data": "abc"}
    for _ in range(2):
        checkpoints.check_configuration(tmp_path / "new", configuration)
    with pytest.raises(CheckpointError) as error:
        checkpoints.check_configuration(
            tmp_path / "new", configuration | {"--cell": "gru", "--clip": 1.0}
        )
    assert str(error.value).splitlines()[1:3] == [
        "  --cell: lstm there, gru here",
        "  --clip: nothing there, 1.0 here",
    ]


@pytest.mark.parametrize("how", ["truncated", "empty", "list"])
def test_damaged_configuration(tmp_path: Path, how: str) -> None:
    configuration = {"--seed": 0}
    checkpoints.check_configuration(tmp_path, configuration)
    path = tmp_path / "configuration.json"
    path.write_text("[]") if how == "list" else damage(path, how)
    with pytest.raises(CheckpointError, match=r"configuration\.json is damaged .*: delete it"):
        checkpoints.check_configuration(tmp_path, configuration)


class Counter(nnx.Module):
    """A model of one number, to which each step adds."""

    def __init__(self) -> None:
        self.total = nnx.Param(jnp.zeros(()))
        self.rngs = nnx.Rngs(0)  # Random state is not kept.


def make_args(**given: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="test")
    options.add_common_arguments(parser)
    options.add_training_arguments(parser)
    parser.set_defaults(epochs=4)
    return argparse.Namespace(**vars(parser.parse_args([])) | given)


def count(
    args: argparse.Namespace, *, stop_at: int | None = None, best: bool = False
) -> tuple[Counter, training.Run, list[tuple[int, int]]]:
    """A run of three steps an epoch; raises KeyboardInterrupt in step `stop_at`."""
    model, seen = Counter(), []
    with training.Run(
        args,
        devices.connect(args),
        modules=(model,),
        steps_per_epoch=3,
        carry=np.zeros((2, 1), np.float32),
        best=("loss", "test") if best else None,
    ) as run:
        for epoch in run.epochs():
            for step in run.steps():
                if run.global_step == stop_at:
                    raise KeyboardInterrupt
                seen.append((epoch, step))
                model.total[...] += 1 + step
                run.carry = run.carry + 1
                run.record(jnp.asarray(float(run.global_step)), 5)
            test_loss = abs(epoch - 2.0)
            run.end_epoch({"loss": {"train": run.mean_loss(), "test": test_loss}})
        if best:
            run.use_best()
    return model, run, seen


def test_run_goes_through_every_step(capsys: pytest.CaptureFixture) -> None:
    model, run, seen = count(make_args(epochs=2))
    assert seen == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
    assert float(model.total[...]) == 12
    assert run.curves == {"loss": {"train": [1.0, 4.0], "test": [1.0, 0.0]}}
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("epoch 2/2: train loss 4.0000, test loss 0.0000, ")
    assert lines[1].endswith(" sequences/s")


@pytest.mark.parametrize("stop_at", [2, 3, 7])
def test_run_goes_on_from_its_last_checkpoint(tmp_path: Path, stop_at: int) -> None:
    args = make_args(checkpoint_dir=tmp_path / "kept", save_every=2)
    expected, whole, _ = count(make_args(save_every=2))
    with pytest.raises(KeyboardInterrupt):
        count(args, stop_at=stop_at)
    model, run, seen = count(args)
    # A checkpoint comes after every second step and after every epoch of three.
    assert seen[0] == {2: (1, 2), 3: (2, 0), 7: (3, 0)}[stop_at]
    assert float(model.total[...]) == float(expected.total[...]) == 24
    assert run.curves == whole.curves
    # Finished: nothing is done again.
    model, run, seen = count(args)
    assert (float(model.total[...]), run.curves, seen) == (24, whole.curves, [])


def test_run_restores_the_carry(tmp_path: Path) -> None:
    args = make_args(checkpoint_dir=tmp_path, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        count(args, stop_at=5)
    run = training.Run(
        args, devices.connect(args), modules=(Counter(),), steps_per_epoch=3,
        carry=np.zeros((2, 1), np.float32),
    )  # fmt: skip
    np.testing.assert_array_equal(run.carry, [[2], [2]])
    assert (run.epoch, run.step, run.global_step) == (2, 2, 5)


def test_best_weights_are_kept(tmp_path: Path) -> None:
    for args in (make_args(), make_args(checkpoint_dir=tmp_path)):
        model, _, _ = count(args, best=True)
        assert float(model.total[...]) == 12  # After the second epoch.
    # Again after the end, when only the files know.
    model, _, seen = count(args, best=True)
    assert (float(model.total[...]), seen) == (12, [])
    loaded = Counter()
    training.load_best(tmp_path, loaded)
    assert float(loaded.total[...]) == 12
    with pytest.raises(CheckpointError, match="holds no best weights"):
        training.load_best(tmp_path / "none", loaded)
    shutil.rmtree(tmp_path / "best")
    with pytest.raises(CheckpointError, match="holds no best weights"):
        count(make_args(checkpoint_dir=tmp_path), best=True)


def test_other_options_are_refused(tmp_path: Path) -> None:
    count(make_args(checkpoint_dir=tmp_path, epochs=1))
    with pytest.raises(CheckpointError, match="--seed: 0 there, 1 here") as error:
        count(make_args(checkpoint_dir=tmp_path, epochs=2, seed=1))
    assert "--epochs" not in str(error.value)
    count(make_args(checkpoint_dir=tmp_path, epochs=1, out=Path("elsewhere"), save_every=9))


@pytest.mark.parametrize("stop_at", [None, 4])
def test_more_epochs_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture, stop_at: int | None
) -> None:
    """From the end of a run, or from where it was interrupted, to what the longer run gives."""
    expected, whole, _ = count(make_args(epochs=4), best=True)
    if stop_at is None:
        count(make_args(checkpoint_dir=tmp_path, epochs=2), best=True)
    else:
        with pytest.raises(KeyboardInterrupt):
            count(make_args(checkpoint_dir=tmp_path, epochs=2, save_every=1), stop_at=stop_at)
    capsys.readouterr()
    model, run, seen = count(make_args(checkpoint_dir=tmp_path, epochs=4), best=True)
    assert seen[0] == ((3, 0) if stop_at is None else (2, 1))
    assert run.curves == whole.curves
    assert float(model.total[...]) == float(expected.total[...])
    [first, *_] = capsys.readouterr().out.splitlines()
    assert first.endswith(f"found in {tmp_path}, --epochs: 2 there, 4 here")
    # What is written down has changed with it.
    count(make_args(checkpoint_dir=tmp_path, epochs=4), best=True)
    assert capsys.readouterr().out == f"going on from its end, found in {tmp_path}\n"


@pytest.mark.parametrize(("stop_at", "done"), [(None, 4), (6, 2), (7, 3)])
def test_fewer_epochs_than_are_done(tmp_path: Path, stop_at: int | None, done: int) -> None:
    args = make_args(checkpoint_dir=tmp_path, save_every=1)
    if stop_at is None:
        count(args)
    else:
        with pytest.raises(KeyboardInterrupt):
            count(args, stop_at=stop_at)
    message = f"has come to epoch {done}, further than --epochs {done - 1}: give at least {done}"
    with pytest.raises(CheckpointError, match=message):
        count(make_args(checkpoint_dir=tmp_path, epochs=done - 1))
    _, run, _ = count(make_args(checkpoint_dir=tmp_path, epochs=done))
    assert len(run.curves["loss"]["test"]) == done


def test_runs_of_other_kinds_write_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["examples/program.py"])
    parser = argparse.ArgumentParser(prog="program.py")
    options.add_common_arguments(parser)
    parser.add_argument("--toy", action="store_true")
    assert "runs/program," in parser.format_help()
    for argv, folder in [
        ([], "runs/program"),
        (["--smoke"], "runs/program-smoke"),
        (["--toy"], "runs/program-toy"),
        (["--toy", "--smoke"], "runs/program-toy-smoke"),
        (["--toy", "--smoke", "--out", "here"], "here"),
    ]:
        args = parser.parse_args(argv)
        options.configure(args)
        assert args.out == Path(folder)
        assert (tmp_path / folder).is_dir()


@pytest.mark.parametrize(
    ("train", "test", "scale"),
    [
        ([2.0, 0.5, 0.01], [2.0, 1.0, 0.9], "log"),
        ([900.0, 200.0], [400.0, 80.0], "log"),
        ([3.6, 1.9], [2.8, 2.2], "linear"),
        ([9.0, 80.0], [8.0, 99.0], "linear"),  # It rises, as an accuracy does.
        ([2.0, 0.0], [2.0, 0.1], "linear"),
        ([2.0, 0.01], [2.0, np.nan], "linear"),
    ],
)
def test_curves_that_fall_far_are_logarithmic(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    train: list[float],
    test: list[float],
    scale: str,
) -> None:
    figures = []
    close = plots.plt.close
    monkeypatch.setattr(plots.plt, "close", figures.append)
    curves = {"loss": {"train": train, "test": test}, "accuracy (%)": {"test": [1.0, 99.0]}}
    plots.save_curves(tmp_path / "curves.png", curves)
    runs = {"LSTM": [(10, train)], "GRU": [(5, test)]}
    plots.save_losses(tmp_path / "losses.png", [plots.LossPanel("a task", runs, baseline=1.0)])
    scales = [[axes.get_yscale() for axes in figure.axes] for figure in figures]
    assert scales == [[scale, "linear"], [scale]]
    for figure in figures:
        close(figure)


def test_epoch_without_an_end_is_told() -> None:
    args = make_args()
    run = training.Run(args, devices.connect(args), modules=(Counter(),), steps_per_epoch=3)
    with pytest.raises(RuntimeError, match="end_epoch was not called"):
        for _ in run.epochs():
            pass


def test_keys_differ_from_step_to_step() -> None:
    args = make_args()
    run = training.Run(args, devices.connect(args), modules=(Counter(),), steps_per_epoch=3)
    keys = []
    for run.epoch, run.step in [(1, 0), (1, 1), (2, 0)]:
        keys.append(jax.random.key_data(run.key()).tolist())
    assert len({tuple(key) for key in keys}) == 3


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_events_for_tensorboard(tmp_path: Path) -> None:
    count(make_args(log_dir=tmp_path, epochs=2))
    events = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for tag in (b"loss/step", b"loss/train", b"loss/test"):
        assert tag in events


def test_log_without_a_terminal(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line now and then, and no bar; the speed is that after the first call, which compiles."""
    clock = iter([0.0, 100.0, 101.0, 103.0, 104.0, 105.0, 140.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    with reporting.Meter("epoch 1", total=9, done=1, unit="tokens") as meter:
        meter.advance(30)
        meter.show(3.0)
        meter.advance(60, steps=2)
        meter.show(2.0)
        meter.advance(40)
        meter.show(0.00054321)
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.splitlines() == [
        "epoch 1: step 2 of 9, loss 3, 0 tokens/s",
        "epoch 1: step 5 of 9, loss 0.0005432, 20 tokens/s",
    ]


@pytest.mark.parametrize("bias", [True, False])
def test_gates_make_the_state(bias: bool) -> None:
    cell = seqjax.LSTMCell(3, 4, bias=bias)
    params = cell.init(jax.random.key(0))
    xs = jax.random.normal(jax.random.key(1), (6, 3))
    seen = gates.lstm_gates(cell, params, xs)
    _, ys = seqjax.scan(cell, params, xs)
    before = jnp.concatenate([jnp.zeros((1, 4)), seen["c"][:-1]])
    np.testing.assert_allclose(seen["c"], seen["f"] * before + seen["i"] * seen["g"], atol=1e-6)
    np.testing.assert_allclose(ys, seen["o"] * jnp.tanh(seen["c"]), atol=1e-6)


def test_gates_are_drawn(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    drawn = {name: rng.uniform(size=(7, 5)) for name in "ifogc"}
    plots.save_gates(tmp_path / "a.png", drawn, title="a", inputs=rng.uniform(size=(7, 2)))
    plots.save_gates(tmp_path / "b.png", drawn, title="b", labels=list("a word!"))
    # Words, what is not a formula, and what the font does not have.
    words = ["a", "word", "$x^$", "$", "漢", "\t", ""]
    plots.save_gates(tmp_path / "c.png", drawn, title="c", labels=words)
    for name in ("a.png", "b.png", "c.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n")


def test_configuration_file_is_readable(tmp_path: Path) -> None:
    count(make_args(checkpoint_dir=tmp_path, epochs=1))
    there = json.loads((tmp_path / "configuration.json").read_text())
    assert there["--seed"] == 0
    assert there["--epochs"] == 1
    assert not {"--out", "--checkpoint-dir", "--log-dir", "--devices"} & there.keys()
