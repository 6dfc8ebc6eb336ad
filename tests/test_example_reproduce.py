"""examples/reproduce.py and examples/tasks: what the tasks ask, what is written, a short run."""

import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import reproduce
import tasks
from common import files, options
from tasks import learning, reber, records
from tasks.base import Settings

DTYPES = options.DTypes(jnp.dtype("float32"), jnp.dtype("float32"))
# The grammar anew, as a regular expression.
INNER = "B(?:(?:TS*X|PT*VP)(?:XT*VP)*(?:S|XT*VV)|PT*VV)E"
EMBEDDED = re.compile(f"B([TP]){INNER}\\1E")


@pytest.fixture(autouse=True)
def _standard_promotion() -> Iterator[None]:
    """optax's Adam needs it: it raises floats to integer powers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def fails(capsys: pytest.CaptureFixture, *argv: object) -> str:
    """The message of a run that should end with status 2."""
    with pytest.raises(SystemExit) as exit_:
        reproduce.main([str(argument) for argument in argv])
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_adding_asks_for_the_sum_of_the_marked() -> None:
    batch = tasks.Adding(length=12).sample(jax.random.key(0), None, 50)
    inputs, targets = np.asarray(batch.inputs), np.asarray(batch.targets)
    assert inputs.shape == (12, 50, 2)
    for row in range(50):
        marked = [step for step in range(12) if inputs[step, row, 1] == 1]
        assert len(marked) == 2
        assert marked[0] < 6 <= marked[1]
        np.testing.assert_allclose(targets[-1, row], sum(inputs[marked, row, 0]), rtol=1e-6)
    assert set(np.unique(inputs[..., 1])) == {0, 1}
    assert np.asarray(batch.counts).nonzero()[0].tolist() == [11] * 50


def test_copy_shows_symbols_then_blanks_then_marks() -> None:
    task = tasks.CopyMemory(length=15)
    batch = task.sample(jax.random.key(0), None, 4)
    shown = np.asarray(batch.inputs).argmax(-1)
    for row in range(4):
        symbols = shown[:10, row].tolist()
        assert set(symbols) <= set(range(1, 9))
        assert shown[:, row].tolist() == symbols + [0] * 14 + [9] * 11
        assert np.asarray(batch.targets)[:, row].tolist() == [0] * 25 + symbols
    assert len(np.unique(shown[:10])) > 5
    # Blanks for certain, then one of eight symbols by chance.
    assert task.baseline() == pytest.approx(10 * np.log(8) / 35)


@pytest.mark.parametrize("every_step", [True, False])
def test_parity_counts_ones(every_step: bool) -> None:
    task = tasks.Parity(train_length=9, every_step=every_step)
    batch = task.sample(jax.random.key(0), None, 200)
    bits = np.asarray(batch.inputs).argmax(-1)
    lengths = np.asarray(batch.mask).sum(axis=0)
    assert set(lengths) == set(range(1, 10))
    for row, length in enumerate(lengths):
        counted = np.asarray(batch.counts)[:, row].nonzero()[0].tolist()
        assert counted == (list(range(length)) if every_step else [length - 1])
        for step in counted:
            assert batch.targets[step, row] == sum(bits[: step + 1, row]) % 2


def test_parity_is_tested_at_the_last_bit_of_longer_strings() -> None:
    task = tasks.Parity(train_length=9, test_length=30)

    def solve(inputs: jax.Array, mask: jax.Array) -> jax.Array:
        assert set(np.asarray(mask).sum(axis=0)) == set(range(9, 31))
        last = np.asarray(mask) & ~np.roll(np.asarray(mask), -1, axis=0)
        last[-1] = mask[-1]
        parities = np.cumsum(np.asarray(inputs).argmax(-1), axis=0) % 2
        return jax.nn.one_hot(np.where(last, parities, 1 - parities), 2)

    assert set(task.evaluate(solve, seed=0).values()) == {100}
    wrong = task.evaluate(lambda inputs, mask: 1 - solve(inputs, mask), seed=0)
    assert set(wrong.values()) == {0}


def test_reber_strings_are_of_the_grammar() -> None:
    strings = reber.draw_strings(300, seed=0)
    assert all(EMBEDDED.fullmatch(string) for string in strings)
    assert {string[1] for string in strings} == {"T", "P"}
    others = reber.draw_strings(50, seed=0, without=set(strings[:100]))
    assert not set(others) & set(strings[:100])


def test_reber_tells_strings_by_their_successors() -> None:
    """All strings near the grammar, broken ones included, against the regular expression."""
    for string in reber.draw_strings(8, seed=3):
        for place, symbol in itertools.product(range(len(string)), reber.SYMBOLS):
            changed = string[:place] + symbol + string[place + 1 :]
            if EMBEDDED.fullmatch(changed):
                reber.legal_successors(changed)
            else:
                with pytest.raises(ValueError, match=f"not a string .*'{changed}'"):
                    reber.legal_successors(changed)
        for broken in (string[:-1], string[1:], string + "E", string[:4]):
            with pytest.raises(ValueError, match="not a string"):
                reber.legal_successors(broken)


def test_reber_successors_are_those_that_can_be_completed() -> None:
    found = set()
    for length in range(9, 12):
        for inner in itertools.product(reber.SYMBOLS, repeat=length - 6):
            for branch in "TP":
                string = f"B{branch}B{''.join(inner)}E{branch}E"
                if EMBEDDED.fullmatch(string):
                    found.add(string)
    for string in (s for s in found if len(s) == 9):
        for step, legal in enumerate(reber.legal_successors(string)):
            prefix = string[: step + 1]
            # From these prefixes two steps more are enough to end, whatever comes next.
            assert legal == {s[step + 1] for s in found if s.startswith(prefix)}


def test_reber_judges_by_rank() -> None:
    string = "BTBTXSETE"
    legal = reber.legal_successors(string)
    scores = np.array(
        [[1.0 * (symbol in allowed) for symbol in reber.SYMBOLS] for allowed in legal]
    )
    assert reber.judge(scores, string) == [True] * 8
    scores[-2] = [symbol == "P" for symbol in reber.SYMBOLS]  # The long-range one.
    assert reber.judge(scores, string) == [True] * 6 + [False, True]


def test_reber_batches_ask_for_the_next_symbol() -> None:
    batch = reber.encode(["BTBTXSETE", "BPBPVVEPE", "BTBTSXSETE"])
    assert batch.inputs.shape == (9, 3, 7)
    assert batch.mask.sum(axis=0).tolist() == [8, 8, 9]
    assert "".join(reber.SYMBOLS[n] for n in batch.inputs[:9, 2].argmax(-1)) == "BTBTSXSET"
    assert "".join(reber.SYMBOLS[n] for n in batch.targets[:8, 1]) == "PBPVVEPE"


def test_digits_are_read_from_top_to_bottom() -> None:
    task = tasks.Digits(limit=30)
    batch = jax.tree.map(jnp.asarray, task.load(seed=0))
    assert batch.inputs.shape == (8, 30, 8)
    assert abs(float(batch.inputs.mean())) < 1e-5
    assert float(batch.inputs.std()) == pytest.approx(1, abs=1e-4)
    drawn = task.sample(jax.random.key(0), batch, 5)
    known = {np.asarray(batch.inputs[:, i]).tobytes() for i in range(30)}
    assert {np.asarray(drawn.inputs[:, i]).tobytes() for i in range(5)} <= known


def test_forget_gate_starts_open() -> None:
    settings = {"outputs": 3, "key": jax.random.key(0), "dtype": jnp.float32}
    cell = learning.CELLS["lstm"](2, 5)
    bias = np.asarray(learning.init(cell, **settings).cell.b_ih)
    assert (bias[5:10] == 1).all()
    assert (np.abs(np.delete(bias, slice(5, 10))) < 1 / np.sqrt(5)).all()


def test_learns_a_task_and_stops_when_solved() -> None:
    settings = Settings(300, 16, 8, learning_rate=3e-2, solved_loss=0.05, chunk=20)
    task = tasks.Parity(train_length=3, test_length=3)
    outcome = learning.run(task, "rnn", settings, 0, DTYPES)
    assert outcome.steps == 20 * len(outcome.losses) < 300
    assert outcome.losses[-1] < 0.05 < min(outcome.losses[:-1])
    assert outcome.measures["accuracy (%)"] == 100
    assert outcome.sequences_per_second > 0


def test_a_loss_that_is_no_number_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([0.5, float("nan")])
    monkeypatch.setattr(learning, "train_chunk", lambda state, *_, **__: (state, next(losses)))
    settings = Settings(100, 1, 2, chunk=10)
    with pytest.raises(FloatingPointError, match=r"adding rnn seed 0: the loss is nan after 20 st"):
        learning.run(tasks.Adding(length=2), "rnn", settings, 0, DTYPES)


def test_smoke_writes_results_and_goes_on_from_them(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--smoke", "--out", str(tmp_path), "--tasks", "parity", "--dtype", "bfloat16"]
    reproduce.main(argv)
    text = capsys.readouterr().out
    assert "| parity, trained to length 8, tested to 16 | accuracy (%) | RNN |" in text
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    [record] = json.loads((tmp_path / "results.json").read_text())
    assert record["settings"]["dtype"] == "bfloat16"
    assert record["steps"] == 20
    assert (tmp_path / "results.md").read_text() in text

    def not_again(*args: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(learning, "run", not_again)
    reproduce.main(argv)
    assert "parity rnn seed 0: done before" in capsys.readouterr().out

    message = fails(capsys, *argv, "--steps", "30")
    assert "other settings: steps 20 there and 30 now. Give another --out" in message

    path = next((tmp_path / "runs").iterdir())
    path.write_text(path.read_text()[:-20])
    message = fails(capsys, *argv)
    assert f"{path} is not a result of this program" in message


def test_an_interruption_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = learning.Outcome({"accuracy (%)": 99.0}, 20, 100, 1.0, 2.0, [0.5, 0.25])
    trained = []

    def interrupted(task: tasks.Task, cell: str, settings: Settings, seed: int, _: object) -> None:
        if seed == 2 and trained[-1] == 1:
            trained.append(-1)
            raise KeyboardInterrupt
        trained.append(seed)
        return outcome

    monkeypatch.setattr(learning, "run", interrupted)
    argv = ["--smoke", "--out", str(tmp_path), "--tasks", "parity", "--seeds", "3", "--seed", "0"]
    with pytest.raises(SystemExit, match="the same command goes on"):
        reproduce.main(argv)
    assert len(list((tmp_path / "runs").iterdir())) == 2
    reproduce.main(argv)
    assert trained == [0, 1, -1, 2]
    assert "| 3 | 20 |" in capsys.readouterr().out


def result(cell: str, seed: int, value: float, steps: int) -> records.Record:
    return {
        "task": "adding",
        "cell": cell,
        "seed": seed,
        "title": "adding problem, T=600",
        "settings": {},
        "measures": {"mean squared error": value, "steps": 5},
        "steps": steps,
        "seconds": 90.0,
        "hardware": "a computer",
        "dtype": "float32",
    }


def test_table_puts_ours_beside_the_published() -> None:
    found = [
        result("lstm", 0, 0.17, 2000),
        result("gru", 0, 4e-5, 900),
        result("gru", 1, 8e-5, 1000),
    ]
    lines = records.table(found, reproduce.TASKS).splitlines()
    start = "| adding problem, T=600 | mean squared error |"
    assert f"{start} LSTM | 0.17 | 0.164 | 1 | 2,000 | 15,625 | 1.5 | steps: 5 |" in lines
    ours = "GRU | 6e-05 (4e-05 to 8e-05) | 5.3e-5 | 2 | 900 to 1,000 | 15,625 | 1.5"
    assert f"{start} {ours} | steps: 5 |" in lines
    assert "a computer; float32" in lines
    assert any("arXiv 1803.01271" in line for line in lines)


def test_unfinished_files_are_not_read(tmp_path: Path) -> None:
    path = records.path_of(tmp_path, "adding", "gru", 0)
    files.write(path, records.to_json(result("gru", 0, 1.0, 1)))
    path.with_name(f"{path.name}.17.unfinished").write_text("{")
    assert len(records.load_all(tmp_path, ["adding"], ["gru"])) == 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--tasks", "mnist"], "--tasks mnist needs --data-dir or --download"),
        (["--split", "8/2"], "--split is for MNIST: give --data-dir"),
        (["--tasks", "chess"], "--tasks: invalid choice: 'chess'"),
        (["--cells", "transformer"], "--cells: invalid choice"),
        (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--tasks", "mnist", "--data-dir", "nowhere"], "nowhere holds none of MNIST's files"),
    ],
)
def test_bad_options(
    capsys: pytest.CaptureFixture, tmp_path: Path, argv: list[str], said: str
) -> None:
    assert said in fails(capsys, "--out", tmp_path, *argv)


def test_plan_takes_mnist_where_it_is(tmp_path: Path) -> None:
    parser = reproduce.make_parser()
    plain = reproduce.plan(parser.parse_args([]))
    assert {run.task.name for run in plain} == set(reproduce.TASKS) - {"mnist"}
    assert {run.settings.steps % run.settings.chunk for run in plain} == {0}
    longer = reproduce.plan(parser.parse_args(["--steps", "15625"]))
    assert {(run.settings.steps, run.settings.chunk) for run in longer} == {(15625, 25)}
    with_mnist = reproduce.plan(parser.parse_args(["--data-dir", str(tmp_path), "--seeds", "2"]))
    assert len(with_mnist) == 2 * 3 * len(reproduce.TASKS)
    assert "folder" not in records.describe(with_mnist[-1].task, with_mnist[-1].settings, "float32")
