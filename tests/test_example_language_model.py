"""Tests of examples/language_model.py and of the modules that are its own."""

import argparse
import contextlib
import io
import math
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import language_model
import language_network
import language_options
import text_data
import toy_sequences
from common import options

PANGRAM = "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich. "


def parse(*argv: str) -> argparse.Namespace:
    return language_options.parse("", argv)[1]


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def make_model(vocabulary_size: int, *argv: str) -> language_network.LanguageModel:
    """An untrained model, small."""
    args = parse("--smoke", *argv)
    return language_network.build(vocabulary_size, args, options.dtypes(args.dtype))


@pytest.fixture(autouse=True, scope="module")
def standard_promotion() -> Iterator[None]:
    """Adam needs it: optax raises a Python float to an integer power."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# The toy


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory) -> tuple[language_network.LanguageModel, str, Path]:
    """A model that has learnt the toy's sequences, what was printed, and the output folder."""
    build, built, printed = language_network.build, [], io.StringIO()
    out = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(
            language_network, "build", lambda *args: built.append(build(*args)) or built[0]
        )
        assert language_model.main(["--toy", "--smoke", "--out", str(out)]) == 0
    return built[0], printed.getvalue(), out


@pytest.fixture(scope="module")
def toy(toy_run) -> language_network.LanguageModel:
    return toy_run[0]


def decode_greedily(
    model: language_network.LanguageModel, stop: int | None, length: int
) -> np.ndarray:
    firsts = jnp.array([[sequence[0] for sequence in toy_sequences.SEQUENCES]])
    return np.asarray(
        language_network.write(model, firsts, length=length, temperature=0.0, stop=stop)
    )


def test_toy_sequences():
    lengths = [len(sequence) for sequence in toy_sequences.SEQUENCES]
    assert lengths == [20, 5, 8, 10, 15, 18, 17, 6, 6, 18]
    used = {token for sequence in toy_sequences.SEQUENCES for token in sequence}
    assert used < set(range(toy_sequences.VOCABULARY_SIZE))
    assert not {toy_sequences.PAD, toy_sequences.END} & used
    assert toy_sequences.PAD != toy_sequences.END
    assert 0 <= toy_sequences.END < toy_sequences.VOCABULARY_SIZE


def test_toy_reproduces_every_sequence(toy_run):
    _, printed, out = toy_run
    *_, epoch, last = printed.splitlines()
    assert last == "10 of 10 sequences reproduced"
    assert int(re.match(r"epoch (\d+): ", epoch)[1]) % toy_sequences.CHECK_EVERY == 0
    assert is_picture(out / "curves.png")


def test_toy_says_when_it_ran_out_of_epochs(tmp_path, capsys, monkeypatch):
    steps = []
    monkeypatch.setattr(toy_sequences, "count_reproduced", lambda model: 7)
    monkeypatch.setattr(toy_sequences, "train_step", lambda *args: steps.append(args) or 1.0)
    argv = ["--toy", "--smoke", "--epochs", "12", "--out", str(tmp_path)]
    assert language_model.main(argv) == 1
    assert len(steps) == 12
    assert capsys.readouterr().out.splitlines()[-1] == "7 of 10 sequences reproduced"


def test_decoding_equals_teacher_forcing(toy):
    inputs, targets, mask = map(np.asarray, toy_sequences.batch())
    scores, _ = toy(inputs, mask=mask)
    forced = np.asarray(scores.argmax(-1))
    decoded = decode_greedily(toy, toy_sequences.END, length=len(inputs))
    np.testing.assert_array_equal(forced[mask], targets[mask])
    np.testing.assert_array_equal(decoded[mask], forced[mask])
    np.testing.assert_array_equal(decoded[~mask], toy_sequences.END)


def test_decoding_without_an_end_stops_at_its_bound(toy):
    decoded = decode_greedily(toy, None, length=30)
    assert decoded.shape == (30, 10)
    # Fed with its own output, the model says the same as when given all of it at once.
    firsts = np.array([[sequence[0] for sequence in toy_sequences.SEQUENCES]])
    scores, _ = toy(np.concatenate([firsts, decoded[:-1]]))
    np.testing.assert_array_equal(decoded, scores.argmax(-1))


# The network


def test_temperature_one_draws_from_the_models_distribution():
    model = make_model(5, "--cell", "rnn")
    prompt = jnp.full((1, 20_000), 2)
    scores, _ = model(prompt[:, :1])
    expected = jax.nn.softmax(scores[-1, 0])
    drawn = language_network.write(model, prompt, length=1, temperature=1.0, key=jax.random.key(1))
    frequencies = np.bincount(drawn[0], minlength=5) / drawn.size
    np.testing.assert_allclose(frequencies, expected, atol=0.015)


def test_tied_embeddings_are_one_array_with_one_gradient():
    model = make_model(7, "--cell", "rnn", "--tie-embeddings")
    shapes = [param.shape for param in jax.tree.leaves(nnx.state(model, nnx.Param))]
    assert shapes.count((7, 64)) == 1
    assert (64, 7) not in shapes
    tokens, targets = jnp.array([[2], [3]]), jnp.array([[3], [4]])

    def loss(model: language_network.LanguageModel, table: jax.Array | None) -> jax.Array:
        """With `table` given, the ends are two arrays: it reads out, the model's embeds."""
        inputs = model.embedding(tokens)
        hidden, _ = model.recurrent(inputs)
        scores = model(tokens)[0] if table is None else hidden @ table.T + model.bias[...]
        return optax.softmax_cross_entropy_with_integer_labels(scores, targets).sum()

    @nnx.jit
    def gradients(model: language_network.LanguageModel) -> tuple[jax.Array, ...]:
        table = model.embedding.embedding[...]
        together = nnx.grad(loss)(model, None)
        embeds, reads = nnx.grad(loss, argnums=(0, 1))(model, table)
        return together.embedding.embedding[...], embeds.embedding.embedding[...], reads

    together, embeds, reads = gradients(model)
    assert np.count_nonzero(np.any(embeds, axis=1)) == 2  # The tokens that are read,
    assert np.all(np.any(reads, axis=1))  # and all of those that could follow.
    np.testing.assert_allclose(together, embeds + reads, rtol=1e-5, atol=1e-6)


def test_dropout_needs_a_key_and_is_not_saved():
    model = make_model(7, "--cell", "rnn", "--num-layers", "2", "--dropout", "0.5")
    assert not jax.tree.leaves(nnx.state(model, nnx.RngState))
    tokens = jnp.zeros((4, 3), jnp.int32)
    call = nnx.jit(lambda model, key: model(tokens, key=key)[0])
    first, again, other = (call(model, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
    without, _ = model(tokens)
    np.testing.assert_array_equal(without[:, 0], without[:, 1])
    assert np.any(first[:, 0] != first[:, 1])


def test_init_range_is_of_all_parameters():
    model = make_model(50, "--init-range", "0.01", "--tie-embeddings", "--dtype", "bfloat16")
    for param in jax.tree.leaves(nnx.state(model, nnx.Param)):
        assert param.dtype == jnp.float32
        assert 0.008 < np.abs(param).max() <= 0.01
        assert abs(float(param.mean())) < 0.005


def test_evaluation_is_exact_however_the_text_is_cut():
    """All targets but the first token, once each, given all tokens before it."""
    model = make_model(7, "--dropout", "0.5", "--hidden-size", "16")
    ids = np.random.default_rng(0).integers(0, 7, 102, dtype=np.int32)
    scores, _ = model(ids[:-1, None])
    log_probabilities = jax.nn.log_softmax(scores[:, 0])[np.arange(101), ids[1:]]
    with jax.numpy_dtype_promotion("strict"):
        for steps in (9, 101, 128):
            mean = language_network.mean_loss(model, ids, steps)
            assert mean == pytest.approx(-float(log_probabilities.mean()), rel=1e-6)
        # The shortest text that there is.
        shortest = language_network.mean_loss(model, ids[:2], 9)
        assert shortest == pytest.approx(-float(log_probabilities[0]), rel=1e-6)


def test_metrics():
    assert language_network.perplexity(math.log(50)) == pytest.approx(50)
    assert language_network.bits(math.log(8)) == pytest.approx(3)
    for metric in (language_network.perplexity, language_network.bits):
        assert metric(math.nan) == metric(1e9) > 1000


# Texts


def test_words_of_the_penn_treebank():
    """Its files hold <unk> and one sentence a line, between spaces."""
    text = " no it was n't black monday \n but while the <unk> <unk> stock \n"
    vocabulary = text_data.Vocabulary.of(text, "word")
    assert len(vocabulary) == 12  # 10 words, <unk> and <eos>; none is left out.
    assert vocabulary.tokens[vocabulary.unknown] == "<unk>"
    ids = vocabulary.encode(text)
    assert ids.dtype == np.int32
    assert [vocabulary.tokens[number] for number in ids] == text.replace("\n", "<eos>").split()
    assert vocabulary.decode(ids).split("\n") == [line.strip() for line in text.split("\n")]
    assert vocabulary.decode(vocabulary.encode("black zebra")) == "black <unk>"


def test_words_that_occur_once_teach_the_unknown_word():
    text = "the cat and the dog and\n\nthe <eos> horse"
    vocabulary = text_data.Vocabulary.of(text, "word")
    assert set(vocabulary.tokens) == {"the", "and", "<eos>", "<unk>"}
    assert vocabulary.decode(vocabulary.encode("the cat\n\nthe")) == "the <unk>\n\nthe"


def test_vocabulary_size_keeps_the_most_frequent():
    text = "a a a a b b b c c d"
    vocabulary = text_data.Vocabulary.of(text, "word", size=3)
    assert set(vocabulary.tokens) == {"a", "b", "<unk>"}
    vocabulary = text_data.Vocabulary.of("aaaabbbccd", "char", size=3)
    assert vocabulary.decode(vocabulary.encode("abcd")) == "ab\ufffd\ufffd"


def test_characters_are_all_kept():
    vocabulary = text_data.Vocabulary.of("naïve 🙂\n", "char")
    assert vocabulary.decode(vocabulary.encode("naïve 🙂\nx")) == "naïve 🙂\n\ufffd"
    assert vocabulary.tokens[vocabulary.line_end()] == "\n"
    assert text_data.Vocabulary.of("no line", "char").line_end() is None


def test_library_is_about_a_megabyte():
    assert 8e5 < len(text_data.library()) < 2e6


def test_documentation_is_prose_without_repetition():
    """No paragraph of the test split is in the training split."""
    splits = text_data.load("word")
    assert 40_000 < len(text_data.split("".join(splits), "word")) < 100_000
    train, test = (set(part.split("\n\n")) for part in (splits.train, splits.test))
    assert len(test) > 100
    assert not train & test


@pytest.mark.parametrize("module", ["no_such_module", "no_such_package.module", "itertools"])
def test_library_without_a_module(monkeypatch, capsys, module):
    monkeypatch.setattr(text_data, "LIBRARY_MODULES", ["csv", module])
    assert f"without the source of its module '{module}'" in message_of_exit(capsys)


def test_python_without_its_documentation(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert "without its documentation" in message_of_exit(capsys, "--level", "word")


@pytest.mark.parametrize(("length", "batch_size", "bptt"), [(101, 4, 5), (107, 4, 5), (64, 7, 9)])
def test_chunks_are_continuous_streams(length, batch_size, bptt):
    ids = np.arange(length, dtype=np.int32)
    inputs, targets = text_data.chunks(ids, batch_size, bptt)
    steps = (length - 1) // batch_size // bptt * bptt
    assert inputs.shape == targets.shape == (steps // bptt, bptt, batch_size)
    np.testing.assert_array_equal(targets, inputs + 1)
    streams = inputs.reshape(-1, batch_size).T
    assert (np.diff(streams) == 1).all()
    assert len(np.unique(streams)) == streams.size


# Options


def test_presets_are_as_published():
    """Zaremba et al. 2014, and the settings of TensorFlow's ptb_word_lm.py."""
    names = ["hidden_size", "bptt", "dropout", "init_range", "clip", "decay", "decay_after"]
    published = {
        "zaremba-small": [200, 20, 0.0, 0.1, 5, 0.5, 4, 13],
        "zaremba-medium": [650, 35, 0.5, 0.05, 5, 0.8, 6, 39],
        "zaremba-large": [1500, 35, 0.65, 0.04, 10, 1 / 1.15, 14, 55],
    }
    assert language_options.PRESETS.keys() == published.keys()
    for preset, values in published.items():
        args = parse("--preset", preset)
        assert [getattr(args, name) for name in [*names, "epochs"]] == values
        assert args.embedding_size == args.hidden_size
        assert (args.cell, args.num_layers, args.level) == ("lstm", 2, "word")
        assert (args.optimizer, args.learning_rate, args.schedule) == ("sgd", 1, "exponential")
        assert (args.batch_size, args.vocabulary_size, args.tie_embeddings) == (20, 10_000, False)


def test_what_is_given_overrides_presets_and_levels():
    args = parse("--preset", "zaremba-large", "--hidden-size", "8", "--level", "char")
    assert (args.hidden_size, args.embedding_size, args.level) == (8, 1500, "char")
    args = parse("--level", "word", "--no-tie-embeddings", "--smoke", "--epochs", "7")
    assert (args.tie_embeddings, args.epochs, args.hidden_size) == (False, 7, 64)


def test_exponential_schedule_at_epochs():
    args = parse("--preset", "zaremba-small")
    schedule = language_model.make_schedule(args, 10)
    for epoch in range(1, 14):
        first, last = (float(schedule(10 * (epoch - 1) + step)) for step in (0, 9))
        assert first == last == pytest.approx(0.5 ** max(epoch - 4, 0))


def test_cosine_and_constant_schedules():
    args = parse("--learning-rate", "3", "--epochs", "5")
    schedule = language_model.make_schedule(args, 10)
    rates = [float(schedule(step)) for step in range(51)]
    assert rates[0] == 0
    assert rates[5] == max(rates) == 3
    assert rates[50] == pytest.approx(0, abs=1e-6)
    assert np.all(np.diff(rates[5:]) < 0)
    schedule = language_model.make_schedule(parse("--schedule", "constant"), 10)
    assert schedule(0) == schedule(1000) == pytest.approx(4e-3)


def test_patience():
    curve = [5.0, 3.0, 4.0, 3.0, 3.5]
    over = [language_model.is_over(curve[:epochs], 2) for epochs in range(6)]
    assert over == [False, False, False, False, True, True]
    assert not language_model.is_over([1.0, 2.0, 3.0], None)


def message_of_exit(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What the program prints when it refuses its options."""
    with pytest.raises(SystemExit) as exit_info:
        language_model.main(argv)
    assert exit_info.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*text.txt"),
        (b"", "train split is too short, 0 characters: give at least 201, or lower --batch-size 8"),
        (b"short", "train split is too short, 4 characters"),
        (b"x" * 252, None),
        (b"caf\xe9 " * 100, "text.txt is not UTF-8 .byte 3: .*convert it"),
    ],
    ids=["missing", "empty", "short", "long enough", "latin1"],
)
def test_text_files(tmp_path, capsys, content, message):
    path, out = tmp_path / "text.txt", tmp_path / "out"
    if content is not None:
        path.write_bytes(content)
    argv = ["--smoke", "--text", str(path), "--out", str(out)]
    if message is None:
        argv, message = (
            [*argv, "--devices", "3"],
            "--batch-size 8 cannot be spread over 3|--devices 3: this",
        )
    else:
        assert not out.exists()
    assert re.search(message, message_of_exit(capsys, *argv))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--dropout=1", "--dropout: expected 0 <= number < 1, got 1"),
        ("--dropout=nan", "--dropout: expected"),
        ("--temperature=-1", "--temperature: expected"),
        ("--bptt=0", "--bptt: expected at least 1, got 0"),
        ("--cell=tree", "--cell: invalid choice: 'tree'"),
        ("--toy --text=a", "--text: not allowed with argument --toy"),
        ("--toy --preset=zaremba-small", "--preset: not allowed with argument --toy"),
        ("--toy --checkpoint-dir=a", "--checkpoint-dir: not allowed with argument --toy"),
        ("--toy --batch-size=2", "--batch-size: not allowed with argument --toy"),
        ("--train=a", "--train: needs --valid"),
        ("--test=a", "--test: needs --train"),
        ("--text=a --train=a --valid=b", "--train: not allowed with argument --text"),
        ("--tie-embeddings", "got --embedding-size 64 and --hidden-size 256: change one"),
        ("--decay=0.5", "--decay: needs --schedule exponential, got cosine"),
        ("generate", "required: --checkpoint-dir"),
        ("generate --checkpoint-dir=nowhere", "cannot read nowhere/model.json"),
        ("generate --checkpoint-dir=a --top-p=0", "--top-p: expected 0 < number <= 1, got 0"),
        ("generate --checkpoint-dir=a --beams=2 --seed=1", "--seed: not allowed with .*--beams"),
    ],
)
def test_misuse(capsys, argv, message):
    assert re.search(message, message_of_exit(capsys, *argv.split()))


def test_generate_with_a_damaged_description(tmp_path, capsys):
    (tmp_path / "model.json").write_text('{"network": ')
    message = message_of_exit(capsys, "generate", "--checkpoint-dir", str(tmp_path))
    assert re.search("model.json is damaged .*the command that trains writes it anew", message)


# Whole runs


def run_smoke(capsys: pytest.CaptureFixture[str], out: Path, *argv: str) -> str:
    """What the program prints, without the speed."""
    assert language_model.main(["--smoke", "--out", str(out), *argv]) == 0
    return re.sub(r", [\d,]+ (characters|words)/s", "", capsys.readouterr().out)


def test_characters_run_and_go_on_after_an_interruption(tmp_path, capsys, monkeypatch):
    argv = ["--cell", "rnn", "--dropout", "0.1"]
    made, make_optimizer = {}, language_model.make_optimizer
    # The same object every time, so that the training step compiles once for all three runs.
    monkeypatch.setattr(
        language_model, "make_optimizer", lambda *args: made.setdefault("", make_optimizer(*args))
    )
    printed = run_smoke(capsys, tmp_path / "whole", *argv)
    bits = [float(found) for found in re.findall(r"valid bits per character ([\d.]+)", printed)]
    assert len(bits) == 2
    assert bits[1] < bits[0] < 7
    best = re.search(r"^best epoch 2: .* train [\d.]+, valid ([\d.]+), test [\d.]+$", printed, re.M)
    assert float(best[1]) == pytest.approx(bits[1], abs=1e-3)
    assert len(printed.partition("temperature 0.7:\n\n")[2]) == 80 + len("\n")
    assert is_picture(tmp_path / "whole" / "curves.png")

    steps, train_step = [], language_model.train_step

    def interrupted_step(*args, **kwargs):
        steps.append(args)
        if len(steps) == 100:  # Of 79 in an epoch.
            signal.raise_signal(signal.SIGINT)
        return train_step(*args, **kwargs)

    argv += ["--checkpoint-dir", str(tmp_path / "checkpoints")]
    monkeypatch.setattr(language_model, "train_step", interrupted_step)
    with pytest.raises(SystemExit):
        run_smoke(capsys, tmp_path / "first", *argv)
    assert len(steps) == 100
    resumed = run_smoke(capsys, tmp_path / "second", *argv)
    assert "going on from epoch 2, step 21," in resumed
    # The last epoch's line, the best epoch's and the sample.
    assert resumed.partition("epoch 2/2")[1:] == printed.partition("epoch 2/2")[1:]


def test_words_train_keep_the_best_and_generate(tmp_path, capsys, monkeypatch):
    """From three files, in 16 bits, where the two states of an LSTM have different dtypes."""
    argv = ["--level", "word", "--dtype", "bfloat16"]
    for name, count in [("train", 60), ("valid", 10), ("test", 10)]:
        # Of each name the model can only learn that it is not one that it knows.
        text = f"{PANGRAM}\nder <unk> {name} schläft\n" * count
        (tmp_path / f"{name}.txt").write_text(text, "utf-8")
        argv.append(f"--{name}={tmp_path / name}.txt")
    traced, call = [], language_network.LanguageModel.__call__

    def counting_call(model, tokens, state=None, **options):
        traced.append((tokens.shape, options.get("key") is None))
        return call(model, tokens, state, **options)

    monkeypatch.setattr(language_network.LanguageModel, "__call__", counting_call)
    folder = str(tmp_path / "checkpoints")
    argv += ["--epochs", "8", "--patience", "2", "--checkpoint-dir", folder]
    argv += ["--learning-rate", "0.03", "--schedule", "constant"]
    argv += ["--temperature", "0", "--sample-length", "12"]
    printed = run_smoke(capsys, tmp_path / "out", *argv)
    assert "train 900 (60 unknown), valid 150 (20 unknown), test 150 (20 unknown); 14" in printed
    assert traced.count(((25, 8), False)) == 1  # Training.
    assert traced.count(((language_network.EVALUATION_STEPS, 1), True)) == 1
    perplexities = re.findall(r"valid perplexity ([\d.]+)$", printed, re.M)
    best = int(np.argmin(list(map(float, perplexities))))
    assert len(perplexities) == best + 1 + 2 < 8
    assert "stopped: 2 epochs without improvement" in printed
    # The text is the same but for a word, so that the measured one is that of the best weights.
    value = f"{float(perplexities[best]):.3f}"
    assert re.search(rf"^best epoch {best + 1}: .* valid {value}, test {value}$", printed, re.M)
    assert is_picture(tmp_path / "out" / "gates.png")
    sample = printed.partition("temperature 0.0:\n\n")[2]

    # The same from the folder alone.
    prompt = " ".join(text_data.split(f"{PANGRAM}\nder <unk> valid schläft\n" * 2, "word")[:25])
    generate = ["generate", "--checkpoint-dir", folder, "--length", "12", "--prompt", prompt]
    assert language_model.main([*generate, "--temperature", "0"]) == 0
    output = capsys.readouterr()
    assert output.out.endswith(sample)
    assert output.err == "unknown to the model, read as <unk>: valid\n"
    assert language_model.main([*generate, "--top-k", "1", "--num-samples", "2"]) == 0
    _, first, second = re.split("--- sample [12]\n", capsys.readouterr().out)
    assert first == second == output.out
    assert language_model.main([*generate, "--beams", "2"]) == 0
    _, *texts = re.split("--- log probability -[\\d.]+\n", capsys.readouterr().out)
    assert len(set(texts)) == 2
    assert all(text.startswith(output.out.partition("\n")[0]) for text in texts)
