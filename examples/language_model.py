"""Language models with seqjax's layers in Flax NNX: training on a text, and writing more of it.

The model is an embedding, recurrent layers and a readout of one score per next token.

    python examples/language_model.py                      # characters of Python's own library
    python examples/language_model.py --level word         # words of Python's own documentation
    python examples/language_model.py --text book.txt --num-layers 2 --dropout 0.2
    python examples/language_model.py --preset zaremba-medium \\
        --train ptb.train.txt --valid ptb.valid.txt --test ptb.test.txt --checkpoint-dir ptb
    python examples/language_model.py generate --checkpoint-dir ptb --prompt "the company said"
    python examples/language_model.py --toy                # a GRU learns ten sequences by heart

It shows truncated backpropagation through time. The text is cut into streams that lie side by side
in the batch, and those into chunks; the state at the end of a chunk is the initial state of the
next, while gradients stay within a chunk. After each epoch the model is measured on the validation
split; the weights of the best epoch are kept, measured on the test split, and write a sample. With
--checkpoint-dir they can write more later: see generate --help.

--toy shows padded batches with a mask instead: the model trains on ten sequences of unequal length
until, given a first token, it writes down the rest and then stops, feeding on its own output only.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import language_generate
import language_network
import language_options
import numpy as np
import optax
import text_data
import toy_sequences
from common import checkpoints, devices, gates, options, plots, training
from flax import nnx
from language_network import LanguageModel

# Options that change neither the weights after an epoch nor which epoch is the best.
NOT_OF_THE_RUN = {"patience", "temperature", "sample_length"}


def make_optimizer(args: argparse.Namespace, steps_per_epoch: int) -> optax.GradientTransformation:
    """Adam or plain SGD, on gradients whose norm over all parameters is clipped."""
    kind = {"adam": optax.adam, "sgd": optax.sgd}[args.optimizer]
    schedule = make_schedule(args, steps_per_epoch)
    return optax.chain(optax.clip_by_global_norm(args.clip), kind(schedule))


def make_schedule(args: argparse.Namespace, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate at each step."""
    steps = args.epochs * steps_per_epoch
    match args.schedule:
        case "cosine":
            return optax.warmup_cosine_decay_schedule(
                0.0, args.learning_rate, warmup_steps=min(100, steps // 10), decay_steps=steps
            )
        case "exponential":  # learning_rate * decay ** max(epoch - decay_after, 0), from epoch 1.
            return optax.exponential_decay(
                args.learning_rate,
                steps_per_epoch,
                args.decay,
                transition_begin=(args.decay_after - 1) * steps_per_epoch,
                staircase=True,
            )
        case _:
            return optax.constant_schedule(args.learning_rate)


@partial(nnx.jit, static_argnames="group")
def train_step(
    model: LanguageModel,
    optimizer: nnx.Optimizer,
    inputs: jax.Array,
    targets: jax.Array,
    state: Any,
    key: jax.Array,
    *,
    group: devices.Group,
) -> tuple[jax.Array, Any]:
    """One step of training: the mean loss per token, in nats, and the state at the end."""

    def loss_fn(
        model: LanguageModel, inputs: jax.Array, targets: jax.Array, state: Any, key: jax.Array
    ) -> tuple[jax.Array, int, Any]:
        state = jax.lax.stop_gradient(state)  # Truncation: the chunk before is out of reach.
        scores, state = model(inputs, state, key=key)
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, targets)
        # Summed over the chunk's steps, as published learning rates and clipping norms mean it,
        # and averaged over rows.
        return losses.sum(), inputs.shape[1], state

    (loss, state), gradients = group.value_and_grad(
        loss_fn, model, inputs, targets, state, axis=1, key=key
    )
    optimizer.update(model, gradients)
    return loss / len(inputs), state


def is_over(valid: Sequence[float], patience: int | None) -> bool:
    """Whether the last `patience` epochs have brought nothing better than the best before them."""
    return patience is not None and len(valid) - 1 - int(np.argmin([*valid, np.inf])) >= patience


def train(
    model: LanguageModel, corpus: text_data.Encoded, args: argparse.Namespace, group: devices.Group
) -> training.Curves:
    """Trains, or goes on from a checkpoint; leaves the best epoch's weights in the model.

    Returns:
      The curves of the training and the validation split, the former as it was in training.
    """
    quantity, metric = language_network.METRICS[args.level]
    inputs, targets = text_data.chunks(corpus.train, args.batch_size, args.bptt)
    optimizer = nnx.Optimizer(model, make_optimizer(args, len(inputs)), wrt=nnx.Param)
    own = group.rows(args.batch_size)
    with training.Run(
        argparse.Namespace(**{k: v for k, v in vars(args).items() if k not in NOT_OF_THE_RUN}),
        group,
        modules=(model, optimizer),
        steps_per_epoch=len(inputs),
        carry=model.initial_state(args.batch_size),
        carry_axis=1,
        data=checkpoints.fingerprint([*corpus.splits().values()]),
        unit=text_data.LEVELS[args.level],
        best=(quantity, "valid"),
    ) as run:
        if args.checkpoint_dir and group.is_main:
            language_generate.describe(args.checkpoint_dir, args, corpus.vocabulary)
        for _ in run.epochs():
            if is_over(run.curves.get(quantity, {}).get("valid", []), args.patience):
                print(f"stopped: {args.patience} epochs without improvement", flush=True)
                break
            for step in run.steps():
                chunk = group.split((inputs[step][:, own], targets[step][:, own]), axis=1)
                loss, run.carry = train_step(
                    model, optimizer, *chunk, run.carry, run.key(), group=group
                )
                run.record(loss, inputs[step].size)
            valid = language_network.mean_loss(model, corpus.valid)
            run.end_epoch({quantity: {"train": metric(run.mean_loss()), "valid": metric(valid)}})
        run.use_best()
    return run.curves


def report(
    model: LanguageModel,
    corpus: text_data.Encoded,
    curves: training.Curves,
    args: argparse.Namespace,
    group: devices.Group,
) -> None:
    """Says how good the best epoch is on every split, draws, and lets the model write."""
    quantity, metric = language_network.METRICS[args.level]
    best = int(np.argmin(curves[quantity]["valid"]))
    measured = {name: values[best] for name, values in curves[quantity].items()}
    if corpus.test is not None:
        measured["test"] = metric(language_network.mean_loss(model, corpus.test))
    results = ", ".join(f"{name} {value:.3f}" for name, value in measured.items())
    print(f"best epoch {best + 1}: {quantity} {results}")

    # What comes first in the validation split sets the scene.
    sample = language_network.write(
        model,
        corpus.valid[: args.bptt, None],
        length=args.sample_length,
        temperature=args.temperature,
        key=jax.random.key(args.seed),
    )
    print(f"\na sample at temperature {args.temperature}:\n")
    print(corpus.vocabulary.decode(group.whole(sample)[:, 0].tolist()))
    # All processes compute, since the weights are everywhere, and one draws.
    line, seen = gates_over_a_line(model, corpus) if args.cell == "lstm" else ([], None)
    if group.is_main:
        plots.save_curves(args.out / "curves.png", curves)
    if group.is_main and seen:
        title = "an LSTM's first layer over a line of text"
        plots.save_gates(args.out / "gates.png", group.whole(seen), title=title, labels=line)


def gates_over_a_line(
    model: LanguageModel, corpus: text_data.Encoded
) -> tuple[list[str], dict[str, jax.Array]]:
    """The tokens of a line of the validation split, and what the gates do while it is read."""
    vocabulary, recurrent = corpus.vocabulary, model.recurrent
    lines = [vocabulary.encode(line) for line in vocabulary.decode(corpus.valid[:1000]).split("\n")]
    line = max([corpus.valid[:1], *lines], key=len)[:60]  # What a picture has room for.
    inputs = model.embedding(line)
    seen = gates.lstm_gates(recurrent.layer.layers[0], recurrent.params[0], inputs)
    return [vocabulary.tokens[token] for token in line], seen


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["generate"]:
        return language_generate.main(f"{Path(sys.argv[0]).name} generate", argv[1:])
    parser, args = language_options.parse(__doc__, argv)
    if args.toy:
        return toy_sequences.run(args)
    try:
        splits = text_data.load(
            args.level,
            text=args.text,
            files=(args.train, args.valid, args.test) if args.train else (),
            limit=language_options.SMOKE_CHARACTERS if args.smoke else None,
        )
        corpus = text_data.encode(
            splits, args.level, args.vocabulary_size, args.batch_size, args.bptt
        )
        dtypes = options.configure(args)
        group = devices.connect(args)
        group.check_batch(args.batch_size)
        print(corpus.summary())
        model = language_network.build(len(corpus.vocabulary), args, dtypes)
        curves = train(model, corpus, args, group)
    except (text_data.TextError, devices.DeviceError, checkpoints.CheckpointError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    report(model, corpus, curves, args, group)
    return 0


if __name__ == "__main__":
    sys.exit(main())
