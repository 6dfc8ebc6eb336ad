"""Reads handwritten digits row by row: an image is a sequence, its rows are the steps.

    python examples/mnist_rows.py                           # scikit-learn's digits, nothing to get
    python examples/mnist_rows.py --cell gru --num-layers 2
    python examples/mnist_rows.py --data-dir mnist --download        # MNIST, 12 MB
    python examples/mnist_rows.py --data-dir mnist --split 8000/2000 # from the half that is there

It shows a seqjax layer inside a Flax NNX model, trained with optax: the recurrent layer reads
`(batch, rows, columns)`, and its output at the last row goes into a linear classifier. Learning
curves and test images with their predictions are written to runs/mnist_rows, or to --out.
"""

import argparse
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import mnist_data
import numpy as np
import optax
from common import checkpoints, devices, gates, options, plots, training
from flax import nnx

import seqjax.nnx

CELLS = {"lstm": seqjax.nnx.LSTM, "gru": seqjax.nnx.GRU, "rnn": seqjax.nnx.RNN}


class RowClassifier(nnx.Module):
    """A recurrent layer over the rows of an image, and a classifier on what it ends with.

    Args:
      cell: a name in `CELLS`.
      row_size: pixels in a row.
      hidden_size, num_layers: as in PyTorch.
      mean, std: of the pixels; the recurrent layer sees them with mean 0 and deviation 1.
      dtypes: of the recurrence and the parameters.
      rngs: draws the parameters.
    """

    def __init__(
        self,
        cell: str,
        row_size: int,
        hidden_size: int,
        num_layers: int,
        *,
        mean: float,
        std: float,
        dtypes: options.DTypes,
        rngs: nnx.Rngs,
    ) -> None:
        self.mean = mean
        self.std = std
        self.recurrent = CELLS[cell](
            row_size,
            hidden_size,
            num_layers,
            batch_first=True,
            dtype=dtypes.compute,
            param_dtype=dtypes.params,
            rngs=rngs,
        )
        # In the parameters' dtype, so that the loss is exact where the recurrence has 16 bits.
        self.classify = nnx.Linear(
            hidden_size, 10, dtype=dtypes.params, param_dtype=dtypes.params, rngs=rngs
        )

    def __call__(self, pixels: jax.Array) -> jax.Array:
        output, _ = self.recurrent((pixels - self.mean) / self.std)
        return self.classify(output[:, -1])


def losses_of(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


@functools.partial(nnx.jit, static_argnames="group")
def train_step(
    model: RowClassifier,
    optimizer: nnx.Optimizer,
    pixels: jax.Array,
    labels: jax.Array,
    *,
    group: devices.Group,
) -> jax.Array:
    """Updates the model on one batch and returns its loss."""

    def loss_fn(
        model: RowClassifier, pixels: jax.Array, labels: jax.Array, key: None
    ) -> tuple[jax.Array, int, None]:
        return losses_of(model(pixels), labels).sum(), len(labels), None

    (loss, _), grads = group.value_and_grad(loss_fn, model, pixels, labels)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def apply(model: RowClassifier, pixels: jax.Array) -> jax.Array:
    return model(pixels)


def predict(
    model: RowClassifier, pixels: np.ndarray, batch_size: int, group: devices.Group
) -> np.ndarray:
    """Logits of any number of images, in batches of one shape so that nothing compiles twice."""
    padded = np.pad(pixels, ((0, -len(pixels) % batch_size), (0, 0), (0, 0)))
    own = group.rows(batch_size)
    batches = padded.reshape(-1, batch_size, *pixels.shape[1:])[:, own]
    logits = [group.whole(apply(model, group.split(batch))) for batch in batches]
    return np.concatenate(logits)[: len(pixels)]


def train(
    model: RowClassifier,
    train_set: mnist_data.Images,
    test_set: mnist_data.Images,
    args: argparse.Namespace,
    group: devices.Group,
) -> training.Curves:
    """Trains, or goes on from a checkpoint, and returns the curves."""
    steps = len(train_set.labels) // args.batch_size
    schedule = optax.cosine_decay_schedule(args.learning_rate, steps * args.epochs)
    # Clipping: a recurrence can multiply a gradient once per step.
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    with training.Run(
        args,
        group,
        modules=(model, optimizer),
        steps_per_epoch=steps,
        data=checkpoints.fingerprint([*train_set, *test_set]),
    ) as run:
        for epoch in run.epochs():
            # The incomplete last batch is dropped: another image is in it every epoch.
            order = np.random.default_rng((args.seed, epoch)).permutation(len(train_set.labels))
            for step in run.steps():
                batch = order[step * args.batch_size : (step + 1) * args.batch_size]
                batch = batch[group.rows(args.batch_size)]
                pixels, labels = group.split((train_set.pixels[batch], train_set.labels[batch]))
                loss = train_step(model, optimizer, pixels, labels, group=group)
                run.record(loss, args.batch_size)
            logits = predict(model, test_set.pixels, args.batch_size, group)
            test_loss = losses_of(logits, test_set.labels).mean()
            run.end_epoch(
                {
                    "loss": {"train": run.mean_loss(), "test": test_loss},
                    "accuracy (%)": {"test": accuracy(logits, test_set.labels)},
                }
            )
    return run.curves


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return 100 * float(np.mean(logits.argmax(-1) == labels))


def save_predictions(path: Path, test_set: mnist_data.Images, predicted: np.ndarray) -> None:
    """Draws test images with their true and predicted digit: the wrong ones first, in red."""
    rows, columns = 5, 10
    right = predicted == test_set.labels
    shown = np.argsort(right, kind="stable")[: rows * columns]
    figure, tiles = plt.subplots(rows, columns, figsize=(columns, 1.3 * rows))
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.88, hspace=0.3)
    for tile in tiles.flat:
        tile.axis("off")
    for tile, index in zip(tiles.flat, shown, strict=False):
        tile.imshow(test_set.pixels[index], cmap="gray_r", vmin=0, vmax=1)
        title = f"{test_set.labels[index]} → {predicted[index]}"
        tile.set_title(title, color="black" if right[index] else "red", fontsize=10)
    wrong = np.count_nonzero(~right)
    figure.suptitle(
        f"true → predicted: {wrong} of {len(right)} test images wrong, "
        f"{min(wrong, len(shown))} of them shown, in red"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def save_gates(path: Path, model: RowClassifier, image: np.ndarray, group: devices.Group) -> None:
    """Draws the gates of the first layer while it reads an image from top to bottom."""
    recurrent = model.recurrent
    rows = jnp.asarray((image - model.mean) / model.std, recurrent.param_dtype)
    params = group.whole(recurrent.params[0])
    seen = gates.lstm_gates(recurrent.layer.layers[0], params, rows)
    title = "an LSTM over the rows of an image, top to bottom"
    plots.save_gates(path, seen, title=title, inputs=image)


def parse_split(text: str) -> mnist_data.Split:
    try:
        split = mnist_data.Split(*map(int, text.split("/")))
    except (TypeError, ValueError):
        split = mnist_data.Split(0, 0)
    if min(split) < 1:
        raise argparse.ArgumentTypeError(f"expected TRAIN/TEST, such as 8000/2000, got {text!r}")
    return split


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST's IDX files")
    parser.add_argument(
        "--download",
        action="store_true",
        help="fetch what is missing there; without --data-dir, into the user's cache",
    )
    parser.add_argument(
        "--split",
        type=parse_split,
        metavar="TRAIN/TEST",
        help="use so many images; needed where only one half of MNIST is there",
    )
    parser.add_argument("--cell", choices=CELLS, default="lstm", help="default: %(default)s")
    for name, default in [("--hidden-size", 256), ("--num-layers", 1), ("--batch-size", 64)]:
        count = options.at_least(1)
        parser.add_argument(name, type=count, default=default, help="default: %(default)s")
    parser.add_argument(
        "--epochs",
        type=options.at_least(1),
        help="more may be asked of a finished run with checkpoints; the learning rate, which falls "
        "to 0 along a cosine, is then that of the new number (default: 30 for the digits, 10 for "
        "MNIST, 2 with --smoke)",
    )
    parser.add_argument(
        "--learning-rate", type=options.positive, default=5e-3, help="default: %(default)s"
    )
    options.add_common_arguments(parser)
    options.add_training_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        train_set, test_set = mnist_data.load(args.data_dir, args.download, args.split, args.seed)
    except mnist_data.DataError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if args.epochs is None:
        args.epochs = 2 if args.smoke else 10 if args.data_dir or args.download else 30
    if args.smoke:
        train_set = mnist_data.Images(*(array[:512] for array in train_set))
        test_set = mnist_data.Images(*(array[:128] for array in test_set))
    if args.batch_size > len(train_set.labels):
        parser.error(
            f"--batch-size {args.batch_size}: more than the {len(train_set.labels)} images"
        )
    dtypes = options.configure(args)
    try:
        group = devices.connect(args)
        group.check_batch(args.batch_size)
    except devices.DeviceError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")

    _, rows, columns = train_set.pixels.shape
    model = RowClassifier(
        args.cell,
        columns,
        args.hidden_size,
        args.num_layers,
        mean=float(train_set.pixels.mean()),
        std=float(train_set.pixels.std()),
        dtypes=dtypes,
        rngs=nnx.Rngs(args.seed),
    )
    print(
        f"{len(train_set.labels)} images to train on, {len(test_set.labels)} to test on: "
        f"{rows} steps of {columns} numbers each"
    )
    started = time.perf_counter()
    try:
        curves = train(model, train_set, test_set, args, group)
    except checkpoints.CheckpointError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    seconds = time.perf_counter() - started

    logits = predict(model, test_set.pixels, args.batch_size, group)
    if group.is_main:
        plots.save_curves(args.out / "curves.png", curves)
        if args.cell == "lstm":
            save_gates(args.out / "gates.png", model, test_set.pixels[0], group)
        save_predictions(args.out / "predictions.png", test_set, logits.argmax(-1))
    print(
        f"{args.cell}: test accuracy {accuracy(logits, test_set.labels):.2f} % "
        f"after {args.epochs} epochs in {seconds:.1f} s; pictures in {args.out}"
    )


if __name__ == "__main__":
    main()
