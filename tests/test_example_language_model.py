"""Tests of examples/language_model.py and of its text_data.py."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import language_model
import text_data
from common import options

DTYPES = options.DTypes(jnp.dtype("float32"), jnp.dtype("float32"))
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def make_model(vocabulary_size: int, *options: str) -> language_model.LanguageModel:
    """An untrained model, small, for evaluation."""
    _, args = language_model.parse(["--smoke", *options])
    model = language_model.LanguageModel(vocabulary_size, args, DTYPES, nnx.Rngs(args.seed))
    model.eval()
    return model


@pytest.fixture(autouse=True, scope="module")
def standard_promotion() -> Iterator[None]:
    """Adam needs it: optax raises a Python float to an integer power."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def toy() -> language_model.LanguageModel:
    """A model that has learnt the toy's sequences."""
    options = ["--toy", "--cell", "lstm"]
    model = make_model(text_data.TOY_VOCABULARY, *options)
    _, args = language_model.parse(["--smoke", *options])
    reproduced, losses = language_model.train_toy(model, args)
    assert reproduced == 10
    assert len(losses) % language_model.CHECK_EVERY == 0
    model.eval()
    return model


def decode_greedily(model: language_model.LanguageModel, end: int, steps: int) -> np.ndarray:
    firsts = jnp.array([[sequence[0] for sequence in text_data.SEQUENCES]])
    key = jax.random.key(0)
    return np.asarray(language_model.generate(model, firsts, key, 0.0, end, steps=steps))


def test_toy_sequences():
    lengths = [len(sequence) for sequence in text_data.SEQUENCES]
    assert lengths == [20, 5, 8, 10, 15, 18, 17, 6, 6, 18]
    used = {token for sequence in text_data.SEQUENCES for token in sequence}
    assert used < set(range(text_data.TOY_VOCABULARY))
    assert not {text_data.PAD, text_data.END} & used
    assert text_data.PAD != text_data.END
    assert 0 <= text_data.END < text_data.TOY_VOCABULARY


def test_toy_reproduces_every_sequence(tmp_path, capsys):
    assert language_model.main(["--toy", "--smoke", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "10 of 10 sequences reproduced"
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG_SIGNATURE)


def test_toy_says_when_it_ran_out_of_epochs(tmp_path, capsys, monkeypatch):
    steps = []
    monkeypatch.setattr(language_model, "count_reproduced", lambda model: 7)
    monkeypatch.setattr(
        language_model, "train_step", lambda *args, **kwargs: (steps.append(args) or 1.0, None)
    )
    options = ["--toy", "--smoke", "--epochs", "12", "--out", str(tmp_path)]
    assert language_model.main(options) == 1
    assert len(steps) == 12
    assert capsys.readouterr().out.splitlines()[-1] == "7 of 10 sequences reproduced"


def test_decoding_equals_teacher_forcing(toy):
    inputs, targets, mask = map(np.asarray, text_data.toy_batch())
    scores, _ = toy(inputs, mask=mask)
    forced = np.asarray(scores.argmax(-1))
    decoded = decode_greedily(toy, text_data.END, steps=len(inputs))
    np.testing.assert_array_equal(forced[mask], targets[mask])
    np.testing.assert_array_equal(decoded[mask], forced[mask])
    np.testing.assert_array_equal(decoded[~mask], text_data.END)


def test_decoding_without_an_end_stops_at_its_bound(toy):
    decoded = decode_greedily(toy, -1, steps=30)
    assert decoded.shape == (30, 10)
    assert (decoded >= 0).all()
    # Fed with its own output, the model says the same as when given all of it at once.
    firsts = np.array([[sequence[0] for sequence in text_data.SEQUENCES]])
    scores, _ = toy(np.concatenate([firsts, decoded[:-1]]))
    np.testing.assert_array_equal(decoded, scores.argmax(-1))


def test_temperature_one_draws_from_the_models_distribution():
    model = make_model(5, "--cell", "rnn")
    prompt = jnp.full((1, 20_000), 2)
    scores, _ = model(prompt[:, :1])
    expected = jax.nn.softmax(scores[-1, 0])
    drawn = language_model.generate(model, prompt, jax.random.key(1), 1.0, -1, steps=1)
    frequencies = np.bincount(drawn[0], minlength=5) / drawn.size
    np.testing.assert_allclose(frequencies, expected, atol=0.015)


def test_evaluation_in_chunks_equals_one_long_chunk():
    model = make_model(7)
    ids = np.random.default_rng(0).integers(0, 7, 101, dtype=np.int32)
    scores, _ = model(ids[:-1, None])
    log_probabilities = jax.nn.log_softmax(scores[:, 0])[np.arange(100), ids[1:]]
    expected = -float(log_probabilities.mean()) / np.log(2)
    with jax.numpy_dtype_promotion("strict"):
        chunked = language_model.bits_per_character(model, ids, batch_size=1, bptt=9)
    assert chunked == pytest.approx(expected, rel=1e-5)


def test_evaluation_of_streams_in_chunks_equals_long_chunks():
    model = make_model(7, "--cell", "gru", "--num-layers", "2", "--dropout", "0.5")
    ids = np.random.default_rng(0).integers(0, 7, 101, dtype=np.int32)
    whole = language_model.bits_per_character(model, ids, batch_size=3, bptt=34)
    chunked = language_model.bits_per_character(model, ids, batch_size=3, bptt=9)
    assert chunked == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(("length", "batch_size", "bptt"), [(101, 4, 5), (102, 4, 5), (30, 7, 9)])
def test_chunks_cover_the_text(length, batch_size, bptt):
    ids = np.arange(length, dtype=np.int32)
    inputs, targets, mask = text_data.into_chunks(ids, batch_size, bptt)
    assert inputs.shape == targets.shape == mask.shape == (len(mask), bptt, batch_size)
    np.testing.assert_array_equal(np.sort(targets[mask]), ids[1:])
    np.testing.assert_array_equal(targets[mask], inputs[mask] + 1)
    assert mask[:-1].all()
    streams = inputs.reshape(-1, batch_size).T
    for stream, valid in zip(streams, mask.reshape(-1, batch_size).T, strict=True):
        assert (np.diff(stream[valid]) == 1).all()


def run_text_smoke(capsys, out: Path, *options: str) -> str:
    """What the program prints, without the speed."""
    assert language_model.main(["--smoke", "--out", str(out), *options]) == 0
    return re.sub(r", [\d,]+ characters/s", "", capsys.readouterr().out)


def test_text_runs_and_repeats_itself(tmp_path, capsys):
    options = ["--cell", "rnn", "--dropout", "0.1"]
    printed = run_text_smoke(capsys, tmp_path / "first", *options)
    bits = [float(found) for found in re.findall(r"([\d.]+) held out$", printed, re.MULTILINE)]
    assert len(bits) == 2
    assert bits[1] < bits[0] < 7
    assert len(printed.partition("temperature 0.7:\n\n")[2]) == 80 + len("\n")
    assert (tmp_path / "first" / "curves.png").read_bytes().startswith(PNG_SIGNATURE)
    assert run_text_smoke(capsys, tmp_path / "second", *options) == printed


def test_text_from_a_file_compiles_each_function_once(tmp_path, capsys, monkeypatch):
    path = tmp_path / "text.txt"
    sentence = "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich. "
    path.write_text(sentence * 40, "utf-8")
    traced = []
    call = language_model.LanguageModel.__call__

    def counting_call(model, tokens, *args):
        traced.append((tokens.shape, model.dropout.deterministic))
        return call(model, tokens, *args)

    monkeypatch.setattr(language_model.LanguageModel, "__call__", counting_call)
    # With 16 bits the two states of an LSTM have different dtypes.
    options = ["--text", str(path), "--cell", "lstm", "--dtype", "bfloat16"]
    printed = run_text_smoke(capsys, tmp_path, *options)
    assert f"2,088 characters to train on, 232 held out, {len(set(sentence))} diff" in printed
    assert traced.count(((25, 8), False)) == 1  # Training.
    assert traced.count(((25, 8), True)) == 1  # Evaluation.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*text.txt"),
        (b"", "text.txt is too short, 0 characters: give at least 224"),
        (b"short", "text.txt is too short, 5 characters"),
        (b"caf\xe9 " * 100, "text.txt is not UTF-8 .byte 3: .*convert it"),
    ],
    ids=["missing", "empty", "short", "latin1"],
)
def test_bad_text_files(tmp_path, capsys, content, message):
    path, out = tmp_path / "text.txt", tmp_path / "out"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as exit_info:
        language_model.main(["--smoke", "--text", str(path), "--out", str(out)])
    assert exit_info.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not out.exists()


@pytest.mark.parametrize("module", ["no_such_module", "no_such_package.module", "itertools"])
def test_library_without_a_module(monkeypatch, capsys, module):
    monkeypatch.setattr(text_data, "LIBRARY_MODULES", ["csv", module])
    with pytest.raises(SystemExit) as exit_info:
        language_model.main([])
    assert exit_info.value.code == 2
    assert f"without the source of its module '{module}'" in capsys.readouterr().err


def test_library_is_about_a_megabyte():
    assert 8e5 < len(text_data.load(None, None, 1, 1)) < 2e6


def test_encode_numbers_every_character():
    ids, vocabulary = text_data.encode("naïve 🙂\n")
    assert "".join(vocabulary[index] for index in ids) == "naïve 🙂\n"
    assert ids.dtype == np.int32


@pytest.mark.parametrize(
    "option",
    ["--dropout=1", "--dropout=nan", "--temperature=-1", "--bptt=0", "--cell=tree", "--text=a"],
)
def test_bad_options(capsys, option):
    with pytest.raises(SystemExit) as exit_info:
        language_model.main(["--toy", option])
    assert exit_info.value.code == 2
    assert option.split("=")[0] in capsys.readouterr().err
