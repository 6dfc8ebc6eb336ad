"""examples/mnist_rows.py: its data, its options, and a short run."""

import gc
import gzip
import hashlib
import http.server
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import mnist_data
import mnist_rows
from common import devices

MNIST = Path(__file__).parents[2] / "shared" / "data" / "mnist"
FILES = [name.removesuffix(".gz") for name in mnist_data.CHECKSUMS]


@pytest.fixture(autouse=True)
def _standard_promotion() -> Iterator[None]:
    """optax's Adam needs it: it raises floats to integer powers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def write_half(folder: Path, half: str, count: int, *, compress: bool = False) -> np.ndarray:
    """Writes random images of 6 rows of 5, and their labels, and returns the images."""
    rng = np.random.default_rng(count)
    images = rng.integers(0, 256, (count, 6, 5))
    for kind, array in [("images-idx3", images), ("labels-idx1", np.arange(count) % 10)]:
        data = idx_bytes(array)
        name = f"{half}-{kind}-ubyte"
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(data))
        else:
            (folder / name).write_bytes(data)
    return images


def fails(capsys: pytest.CaptureFixture, *argv: object) -> str:
    """The message of a run that should end with status 2."""
    with pytest.raises(SystemExit) as exit_:
        mnist_rows.main([str(argument) for argument in argv])
    assert exit_.value.code == 2
    return capsys.readouterr().err


def epochs(text: str) -> list[str]:
    """The line of each epoch, without the speed."""
    return re.findall(r"^(epoch .*test accuracy \(%\) [\d.]+), [\d,]+ seq", text, re.MULTILINE)


@pytest.mark.parametrize("compress", [False, True])
def test_loads_both_halves(tmp_path: Path, compress: bool) -> None:
    images = write_half(tmp_path, "train", 30, compress=compress)
    write_half(tmp_path, "t10k", 20, compress=compress)
    train, test = mnist_data.load_mnist(tmp_path, None, seed=0)
    assert train.pixels.dtype == np.float32
    np.testing.assert_allclose(train.pixels, images / 255, rtol=1e-6)
    np.testing.assert_array_equal(test.labels, np.arange(20) % 10)


def test_split_draws_from_each_half(tmp_path: Path) -> None:
    images = write_half(tmp_path, "train", 30)
    write_half(tmp_path, "t10k", 20)
    train, test = mnist_data.load_mnist(tmp_path, mnist_data.Split(12, 20), seed=0)
    assert (len(train.labels), len(test.labels)) == (12, 20)
    known = {image.tobytes() for image in (images / 255).astype(np.float32)}
    assert {image.tobytes() for image in train.pixels} <= known


def test_split_divides_the_only_half(tmp_path: Path) -> None:
    images = write_half(tmp_path, "t10k", 20, compress=True)
    split = mnist_data.Split(12, 8)
    train, test = mnist_data.load_mnist(tmp_path, split, seed=0)
    drawn = np.concatenate([train.pixels, test.pixels])
    assert sorted(image.tobytes() for image in drawn) == sorted(
        image.tobytes() for image in (images / 255).astype(np.float32)
    )
    again, _ = mnist_data.load_mnist(tmp_path, split, seed=0)
    np.testing.assert_array_equal(train.pixels, again.pixels)
    other, _ = mnist_data.load_mnist(tmp_path, split, seed=1)
    assert not np.array_equal(train.labels, other.labels)


def test_digits_are_divided_alike() -> None:
    train, test = mnist_data.load_scikit_digits(None, seed=0)
    assert (train.pixels.shape, test.pixels.shape) == ((1437, 8, 8), (360, 8, 8))
    frequencies = [np.bincount(part.labels) / len(part.labels) for part in (train, test)]
    np.testing.assert_allclose(*frequencies, atol=0.003)


@pytest.mark.skipif(not MNIST.is_dir(), reason="the shared MNIST files are not here")
def test_real_mnist(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train, test = mnist_data.load_mnist(MNIST, mnist_data.Split(8000, 2000), seed=0)
    assert (train.pixels.shape, test.pixels.shape) == ((8000, 28, 28), (2000, 28, 28))
    # How often MNIST's test half has each digit.
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(np.concatenate([train.labels, test.labels])).tolist() == counts
    message = fails(capsys, "--data-dir", MNIST)
    assert "only one half of MNIST, of 10000 images" in message
    assert "--split 8000/2000" in message


def break_file(name: str, change: str, folder: Path) -> None:
    path = folder / name
    data = path.read_bytes()
    match change:
        case "truncated":
            path.write_bytes(data[:-1])
        case "longer":
            path.write_bytes(data + b"\0")
        case "header only":
            path.write_bytes(data[:6])
        case "empty":
            path.write_bytes(b"")
        case "magic":
            path.write_bytes(b"<htm" + data[4:])
        case "labels":
            path.write_bytes(data[:-1] + b"\x0a")
        case "truncated gzip":
            path.unlink()
            path.with_name(f"{name}.gz").write_bytes(gzip.compress(data)[:-9])
        case "bad gzip":
            path.unlink()
            packed = bytearray(gzip.compress(data))
            packed[20] ^= 0xFF
            path.with_name(f"{name}.gz").write_bytes(packed)
        case "missing":
            path.unlink()


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (FILES[0], "truncated", r"holds 599 values, but its header promises \(20, 6, 5\)"),
        (FILES[0], "longer", "holds 601 values"),
        (FILES[2], "header only", "is not an IDX file"),
        (FILES[3], "empty", "first bytes are missing, expected 00 00 08 01"),
        (FILES[1], "magic", "first bytes are 3c 68 74 6d, expected 00 00 08 01"),
        (FILES[3], "labels", "holds the label 10, expected 0 to 9"),
        (FILES[2], "truncated gzip", "cannot be read"),
        (FILES[2], "bad gzip", "cannot be read"),
        (FILES[3], "missing", "is missing"),
    ],
)
def test_names_the_broken_file(
    tmp_path: Path, capsys: pytest.CaptureFixture, name: str, change: str, said: str
) -> None:
    write_half(tmp_path, "train", 20)
    write_half(tmp_path, "t10k", 20)
    break_file(name, change, tmp_path)
    message = fails(capsys, "--data-dir", tmp_path)
    assert name in message
    assert re.search(said, message)
    assert "--download" in message


def test_images_and_labels_of_different_sets(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_half(tmp_path, "train", 20)
    (tmp_path / FILES[1]).write_bytes(idx_bytes(np.zeros(19)))
    message = fails(capsys, "--data-dir", tmp_path)
    assert re.search(f"{FILES[0]} holds 20 images but .*{FILES[1]} 19 labels", message)


def test_halves_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_half(tmp_path, "train", 20)
    write_half(tmp_path, "t10k", 20)
    (tmp_path / FILES[2]).write_bytes(idx_bytes(np.zeros((20, 7, 5))))
    message = fails(capsys, "--data-dir", tmp_path)
    assert "images of different sizes: (6, 5) and (7, 5)" in message
    (tmp_path / FILES[2]).write_bytes(idx_bytes(np.zeros((0, 7, 5))))
    (tmp_path / FILES[3]).write_bytes(idx_bytes(np.zeros(0)))
    assert f"{FILES[2]} holds no images" in fails(capsys, "--data-dir", tmp_path)


def test_no_files_or_too_few_images(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "holds none of MNIST's files" in fails(capsys, "--data-dir", tmp_path / "nowhere")
    write_half(tmp_path, "t10k", 20)
    message = fails(capsys, "--data-dir", tmp_path, "--split", "15/6")
    assert "--split asks for 21 images where there are 20" in message


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A web server in the place of MNIST's, and the folder that it serves."""
    served = tmp_path / "served"
    served.mkdir()
    write_half(served, "train", 30, compress=True)
    write_half(served, "t10k", 20, compress=True)
    checksums = {
        path.name: f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}" for path in served.iterdir()
    }

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(served))

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(mnist_data, "URL", f"http://127.0.0.1:{web.server_port}/")
        monkeypatch.setattr(mnist_data, "CHECKSUMS", checksums)
        yield served
        web.shutdown()
        thread.join()
    gc.collect()


# pooch leaves it to the garbage collector to close its connections.
pooch_leaks = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pooch_leaks
def test_download_fetches_what_is_missing(tmp_path: Path, server: Path) -> None:
    write_half(tmp_path, "t10k", 10)
    mnist_data.download_mnist(tmp_path)
    train, test = mnist_data.load_mnist(tmp_path, None, seed=0)
    assert (len(train.labels), len(test.labels)) == (30, 10)


@pooch_leaks
@pytest.mark.parametrize("problem", ["missing", "changed"])
def test_download_fails(
    tmp_path: Path, server: Path, capsys: pytest.CaptureFixture, problem: str
) -> None:
    file = server / f"{FILES[2]}.gz"
    if problem == "missing":
        file.unlink()
    else:
        file.write_bytes(b"something else")
    message = fails(capsys, "--data-dir", tmp_path, "--download")
    assert f"could not download {file.name}" in message
    assert f"put the file into {tmp_path} yourself" in message
    assert not (tmp_path / file.name).exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--split", "8000"], "expected TRAIN/TEST, such as 8000/2000, got '8000'"),
        (["--split", "0/10"], "expected TRAIN/TEST"),
        (["--split", "1790/8"], "--split asks for 1798 images where there are 1797"),
        (["--epochs", "0"], "--epochs: expected at least 1, got 0"),
        (["--hidden-size", "-1"], "--hidden-size: expected at least 1"),
        (["--seed", "-1"], "--seed: expected at least 0"),
        (["--learning-rate", "nan"], "--learning-rate: expected a number above 0"),
        (["--cell", "transformer"], "--cell: invalid choice"),
        (["--out", __file__], "is a file, expected a folder"),
        (["--num-processes", "2"], "give --coordinator HOST:PORT"),
        (["--coordinator", "localhost:1"], "needs --num-processes and --process-id"),
        (
            ["--coordinator", "localhost:1", "--num-processes", "2", "--process-id", "2"],
            "--process-id 2: expected 0 to 1",
        ),
        (["--coordinator", "auto"], "the processes cannot meet by --coordinator auto"),
        (["--devices", "99"], "--devices 99: this machine has 1"),
        (["--batch-size", "2000"], "--batch-size 2000: more than the 1437 images"),
    ],
)
def test_bad_options(capsys: pytest.CaptureFixture, argv: list[str], said: str) -> None:
    jax.devices()  # Once JAX has started, --devices cannot make more of them.
    assert said in fails(capsys, *argv)


def test_smoke_draws_pictures_and_repeats_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    printed = []
    for name in ("once", "again"):
        out = tmp_path / name
        mnist_rows.main(["--smoke", "--seed", "3", "--hidden-size", "16", "--out", str(out)])
        printed.append(epochs(capsys.readouterr().out))
        for picture in ("curves.png", "gates.png", "predictions.png"):
            data = (out / picture).read_bytes()
            assert data.startswith(b"\x89PNG\r\n")
            assert len(data) > 10_000
    assert len(printed[0]) == 2
    assert printed[0] == printed[1]


def test_runs_on_idx_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_half(tmp_path, "train", 64, compress=True)
    write_half(tmp_path, "t10k", 20, compress=True)
    argv = ["--data-dir", str(tmp_path), "--out", str(tmp_path), "--epochs", "1"]
    # An RNN, for its constructor is the one that differs from its siblings'.
    model = ["--cell", "rnn", "--dtype", "bfloat16", "--num-layers", "2", "--hidden-size", "8"]
    mnist_rows.main([*argv, *model])
    text = capsys.readouterr().out
    assert "64 images to train on, 20 to test on: 6 steps of 5 numbers each" in text
    assert len(epochs(text)) == 1
    assert "rnn: test accuracy" in text


def test_predict_pads_the_last_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def sums(model: None, pixels: np.ndarray) -> np.ndarray:
        shapes.append(pixels.shape)
        return pixels.sum((1, 2))[:, None]

    monkeypatch.setattr(mnist_rows, "apply", sums)
    pixels = np.arange(7 * 2 * 3, dtype=np.float32).reshape(7, 2, 3)
    args = mnist_rows.make_parser().parse_args([])
    logits = mnist_rows.predict(None, pixels, 4, devices.connect(args))
    np.testing.assert_array_equal(logits[:, 0], pixels.sum((1, 2)))
    assert shapes == [(4, 2, 3), (4, 2, 3)]
