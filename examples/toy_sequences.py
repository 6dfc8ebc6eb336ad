"""The toy: ten sequences of unequal length that a model learns by heart, in one padded batch."""

import argparse

import jax
import jax.numpy as jnp
import language_network
import numpy as np
import optax
from common import options, plots, reporting
from flax import nnx

import seqjax

SEQUENCES = [
    [85, 14, 80, 34, 99, 20, 31, 65, 53, 86, 3, 58, 30, 4, 11, 6, 50, 71, 74, 13],
    [62, 76, 79, 66, 32],
    [93, 77, 16, 67, 46, 74, 24, 70],
    [19, 83, 88, 22, 57, 40, 75, 82, 4, 46],
    [70, 28, 30, 24, 76, 84, 92, 76, 77, 51, 7, 20, 82, 94, 57],
    [58, 13, 40, 61, 88, 18, 92, 89, 8, 14, 61, 67, 49, 59, 45, 12, 47, 5],
    [22, 5, 21, 84, 39, 6, 9, 84, 36, 59, 32, 30, 69, 70, 82, 56, 1],
    [94, 21, 79, 24, 3, 86],
    [80, 80, 33, 63, 34, 63],
    [87, 32, 79, 65, 2, 96, 43, 80, 85, 20, 41, 52, 95, 50, 35, 96, 24, 80],
]
VOCABULARY_SIZE = 100
PAD = 0
# Decoding needs a token to stop at: the first that no sequence uses.
END = min(set(range(VOCABULARY_SIZE)) - {PAD}.union(*SEQUENCES))
CHECK_EVERY = 10  # Epochs.


def batch() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Padded inputs, targets and mask `(T, batch)`; each target is the next token, or the end."""
    inputs = [np.array(sequence, np.int32) for sequence in SEQUENCES]
    targets = [np.array([*sequence[1:], END], np.int32) for sequence in SEQUENCES]
    lengths = [len(sequence) for sequence in SEQUENCES]
    return (
        seqjax.pad_sequence(inputs, padding_value=PAD),
        seqjax.pad_sequence(targets, padding_value=PAD),
        seqjax.lengths_to_mask(lengths, max(lengths)),
    )


@nnx.jit
def train_step(
    model: language_network.LanguageModel,
    optimizer: nnx.Optimizer,
    inputs: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """One step of training on padded sequences: the mean loss per valid token, in nats."""

    def loss_fn(model: language_network.LanguageModel) -> jax.Array:
        scores, _ = model(inputs, mask=mask, key=key)
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, targets)
        return jnp.mean(losses, where=mask)

    loss, gradients = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, gradients)
    return loss


def count_reproduced(model: language_network.LanguageModel) -> int:
    """How many sequences greedy decoding gives back, end included, from their first token."""
    firsts = jnp.array([[sequence[0] for sequence in SEQUENCES]], jnp.int32)
    rows = language_network.write(
        model,
        firsts,
        length=max(map(len, SEQUENCES)),  # Just enough for the longest and its end.
        temperature=0.0,
        stop=END,
    ).T.tolist()
    wanted = [[*sequence[1:], END] for sequence in SEQUENCES]
    return sum(row[: len(want)] == want for row, want in zip(rows, wanted, strict=True))


def train(
    model: language_network.LanguageModel, args: argparse.Namespace
) -> tuple[int, list[float]]:
    """Trains until all sequences are reproduced, or at most for `args.epochs`.

    Returns:
      How many are reproduced, and the loss in each epoch.
    """
    sequences = batch()
    tx = optax.chain(optax.clip_by_global_norm(args.clip), optax.adam(args.learning_rate))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    key = jax.random.key(args.seed)
    reproduced, losses = 0, []
    for epoch in reporting.progress(range(1, args.epochs + 1), "training"):
        loss = train_step(model, optimizer, *sequences, jax.random.fold_in(key, epoch))
        losses.append(float(loss))
        if epoch % CHECK_EVERY == 0 or epoch == args.epochs:
            reproduced = count_reproduced(model)
            print(f"epoch {epoch}: loss {losses[-1]:.4f}, {reproduced} reproduced", flush=True)
            if reproduced == len(SEQUENCES):
                break
    return reproduced, losses


def run(args: argparse.Namespace) -> int:
    """Trains on the sequences; the exit status says whether all are reproduced."""
    dtypes = options.configure(args)
    model = language_network.build(VOCABULARY_SIZE, args, dtypes)
    reproduced, losses = train(model, args)
    plots.save_curves(args.out / "curves.png", {"loss": {"train": losses}})
    print(f"{reproduced} of {len(SEQUENCES)} sequences reproduced")
    return 0 if reproduced == len(SEQUENCES) else 1
