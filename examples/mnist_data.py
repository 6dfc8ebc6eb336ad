"""The images that mnist_rows.py learns from: scikit-learn's digits, or MNIST's IDX files.

MNIST comes in two halves, `train` (60,000 images) and `t10k` (10,000), of two files each. An IDX
file is two zero bytes, a byte for the type (8: uint8), a byte for the number of dimensions, the
dimensions as big-endian 32-bit integers, then the values.
"""

import gzip
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pooch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
CHECKSUMS = {
    "train-images-idx3-ubyte.gz": "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "md5:d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "md5:9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "md5:ec29112dd5afa0611ce80d1b7f02629c",
}


class DataError(Exception):
    """The data cannot be used; the message says why and what to do."""


class Images(NamedTuple):
    """Images `(count, rows, columns)`, float32 in [0, 1], and their digits `(count,)`, int32."""

    pixels: np.ndarray
    labels: np.ndarray


class Split(NamedTuple):
    """How many images to train on, and how many to test on."""

    train: int
    test: int


def load(
    folder: Path | None, download: bool, split: Split | None, seed: int
) -> tuple[Images, Images]:
    """Images to train and to test on: MNIST's from `folder`, or scikit-learn's digits.

    Args:
      folder: where MNIST's files are; None means the user's cache if `download`, else the digits.
      download: whether to fetch those of MNIST's files that are not there.
      split: how many images to use; None means all.
      seed: of what is drawn at random.

    Raises:
      DataError: the data cannot be used.
    """
    if folder is None and not download:
        return load_scikit_digits(split, seed)
    folder = folder or Path(pooch.os_cache("seqjax")) / "mnist"
    if download:
        download_mnist(folder)
    return load_mnist(folder, split, seed)


def load_scikit_digits(split: Split | None, seed: int) -> tuple[Images, Images]:
    """scikit-learn's 1797 digits of 8 by 8, divided so that each digit is as frequent in both."""
    digits = load_digits()
    images = Images((digits.images / 16).astype(np.float32), digits.target.astype(np.int32))
    if split is not None:
        return _divide(images, split, seed)
    arrays = train_test_split(*images, test_size=0.2, stratify=images.labels, random_state=seed)
    pixels_train, pixels_test, labels_train, labels_test = arrays
    return Images(pixels_train, labels_train), Images(pixels_test, labels_test)


def load_mnist(folder: Path, split: Split | None, seed: int) -> tuple[Images, Images]:
    """MNIST's images to train and to test on, from its IDX files, gzipped or not.

    Args:
      folder: where the files are.
      split: how many images of each half, drawn at random; or, where one half is all there is, how
        to divide that. None means all of both halves.
      seed: of the draw.

    Raises:
      DataError: files are missing or broken, or there are fewer images than asked for.
    """
    halves = [half for name in ("train", "t10k") if (half := _load_half(folder, name)) is not None]
    if not halves:
        raise DataError(
            f"{folder} holds none of MNIST's files: expected train-images-idx3-ubyte, "
            "train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, each with "
            "or without .gz. Give --download to fetch them"
        )
    if len(halves) == 1:
        count = len(halves[0].labels)
        if split is None:
            raise DataError(
                f"{folder} holds only one half of MNIST, of {count} images. Say how to divide it, "
                f"for example --split {count * 4 // 5}/{count // 5}, or give --download to fetch "
                "the other half"
            )
        return _divide(halves[0], split, seed)
    if halves[0].pixels.shape[1:] != halves[1].pixels.shape[1:]:
        sizes = " and ".join(str(half.pixels.shape[1:]) for half in halves)
        raise DataError(f"the two halves in {folder} have images of different sizes: {sizes}")
    if split is None:
        return halves[0], halves[1]
    return _draw(halves[0], split.train, seed), _draw(halves[1], split.test, seed)


def download_mnist(folder: Path) -> None:
    """Fetches those of MNIST's four files (12 MB) that are not in `folder`, and checks them.

    Raises:
      DataError: the network cannot be reached, or what came is not what was expected.
    """
    files = pooch.create(folder, URL, registry=CHECKSUMS)
    for name in CHECKSUMS:
        # A file that is there is left alone, also when another program compressed it.
        if _find(folder, name.removesuffix(".gz")) is None:
            try:
                files.fetch(name, progressbar=True)
            except (OSError, ValueError) as error:  # The network's errors are OSErrors.
                raise DataError(
                    f"could not download {name} from {URL} ({error}). Try again with a network, or "
                    f"put the file into {folder} yourself"
                ) from error


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array in an IDX file, gzipped or not.

    Raises:
      DataError: it is no such file, has other dimensions than expected, or is not whole.
    """
    try:
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):  # Whatever its name says.
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:  # EOFError: gzip's, for a truncated file.
        raise DataError(_broken(path, f"cannot be read ({error})")) from error
    header = 4 + 4 * dimensions
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) < header:
        raise DataError(
            _broken(path, f"is not an IDX file of uint8 in {dimensions} dimensions: its first "
                    f"bytes are {data[:4].hex(' ') or 'missing'}, "
                    f"expected 00 00 08 {dimensions:02x}")
        )  # fmt: skip
    shape = tuple(int(size) for size in np.frombuffer(data[4:header], ">u4"))
    if len(data) - header != math.prod(shape):
        raise DataError(
            _broken(path, f"holds {len(data) - header} values, but its header promises {shape}")
        )
    return np.frombuffer(data[header:], np.uint8).reshape(shape)


def _load_half(folder: Path, half: str) -> Images | None:
    names = f"{half}-images-idx3-ubyte", f"{half}-labels-idx1-ubyte"
    paths = [_find(folder, name) for name in names]
    if paths == [None, None]:
        return None
    for name, path in zip(names, paths, strict=True):
        if path is None:
            raise DataError(
                f"{folder / name}[.gz] is missing, and its counterpart is there. Give --download "
                "to fetch it"
            )
    pixels, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
    if len(pixels) != len(labels):
        raise DataError(
            f"{paths[0]} holds {len(pixels)} images but {paths[1]} {len(labels)} labels: they are "
            "not of one set. Replace one of them"
        )
    if not pixels.size:
        raise DataError(_broken(paths[0], "holds no images"))
    if labels.max() > 9:
        raise DataError(_broken(paths[1], f"holds the label {labels.max()}, expected 0 to 9"))
    return Images(pixels.astype(np.float32) / 255, labels.astype(np.int32))


def _find(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def _divide(images: Images, split: Split, seed: int) -> tuple[Images, Images]:
    both = _draw(images, split.train + split.test, seed)
    train = Images(both.pixels[: split.train], both.labels[: split.train])
    return train, Images(both.pixels[split.train :], both.labels[split.train :])


def _draw(images: Images, count: int, seed: int) -> Images:
    if count > (available := len(images.labels)):
        raise DataError(f"--split asks for {count} images where there are {available}")
    chosen = np.random.default_rng(seed).permutation(available)[:count]
    return Images(images.pixels[chosen], images.labels[chosen])


def _broken(path: Path, what: str) -> str:
    return f"{path} {what}. Delete it and give --download to fetch it again"
