"""Language models with seqjax's layers in Flax NNX: memorising sequences, and writing Python.

The model is an embedding, recurrent layers and a linear readout of one score per next token.

    python examples/language_model.py --toy                # a GRU learns ten sequences by heart
    python examples/language_model.py --toy --cell lstm
    python examples/language_model.py                      # characters of Python's own library
    python examples/language_model.py --text book.txt --num-layers 2 --dropout 0.2

`--toy` shows padded batches with a mask: the model trains on ten sequences of unequal length until,
given a first token, it writes down the rest and then stops, feeding on its own output only.

Without it the program shows truncated backpropagation through time on one long text. The text is
cut into streams that lie side by side in the batch, and those into chunks; the state at the end of
a chunk is the initial state of the next, while gradients stay within a chunk. The last tenth of
the text is held out to measure on. Then the model writes a sample.

Both decode with the trained model itself, one token at a time, in one compiled loop.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import text_data
from common import options, plots, reporting
from flax import nnx

import seqjax
import seqjax.nnx

CHECK_EVERY = 10  # Epochs of the toy.

# Defaults of the character model, what is different for the toy, and for a --smoke run of either.
TEXT = {"cell": "lstm", "embedding_size": 64, "hidden_size": 256, "num_layers": 1, "dropout": 0.0}
TEXT |= {"epochs": 5, "batch_size": 32, "bptt": 64, "learning_rate": 4e-3, "clip": 1.0}
TEXT |= {"temperature": 0.7, "sample_length": 600}
TEXT_SMOKE = {"embedding_size": 16, "hidden_size": 64, "epochs": 2, "batch_size": 8, "bptt": 25}
TEXT_SMOKE |= {"learning_rate": 1e-2, "sample_length": 80}
SMOKE_CHARACTERS = 20_000
TOY = {"cell": "gru", "embedding_size": 256, "hidden_size": 512, "epochs": 1000}
TOY |= {"learning_rate": 1e-3}
TOY_SMOKE = {"embedding_size": 64, "hidden_size": 128, "learning_rate": 1e-2}

CELLS = {"lstm": seqjax.nnx.LSTM, "gru": seqjax.nnx.GRU, "rnn": seqjax.nnx.RNN}


class LanguageModel(nnx.Module):
    """Scores of the next token after each token of a sequence."""

    def __init__(
        self, vocabulary_size: int, args: argparse.Namespace, dtypes: options.DTypes, rngs: nnx.Rngs
    ) -> None:
        options = {"dtype": dtypes.compute, "param_dtype": dtypes.params, "rngs": rngs}
        self.embedding = nnx.Embed(vocabulary_size, args.embedding_size, **options)
        self.recurrent = CELLS[args.cell](
            args.embedding_size,
            args.hidden_size,
            args.num_layers,
            # As in PyTorch it acts between layers, with a warning where there is only one.
            dropout=args.dropout if args.num_layers > 1 else 0.0,
            **options,
        )
        # In the parameters' dtype: the loss sums over the vocabulary, too much for 16 bits.
        options["dtype"] = dtypes.params
        self.readout = nnx.Linear(args.hidden_size, vocabulary_size, **options)
        self.dropout = nnx.Dropout(args.dropout, rngs=rngs)

    def __call__(
        self, tokens: jax.Array, state: Any = None, mask: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """Tokens and mask `(T, batch)` to scores `(T, batch, vocabulary)` and the last state."""
        inputs = self.dropout(self.embedding(tokens))
        output, state = self.recurrent(inputs, state, mask=mask)
        return self.readout(self.dropout(output)), state

    def initial_state(self, batch_size: int) -> Any:
        """Zeros that look like the state that a call returns, so that all chunks compile once."""
        inputs = jnp.zeros((1, batch_size, self.recurrent.input_size), self.recurrent.dtype)
        _, state = jax.eval_shape(lambda: self.recurrent(inputs, deterministic=True))
        return jax.tree.map(jnp.zeros_like, state)


def make_optimizer(
    model: LanguageModel, learning_rate: float | Callable[..., Any], clip: float
) -> nnx.Optimizer:
    """Adam, on gradients whose norm over all parameters is clipped."""
    adam = optax.chain(optax.clip_by_global_norm(clip), optax.adam(learning_rate))
    return nnx.Optimizer(model, adam, wrt=nnx.Param)


@nnx.jit
def train_step(
    model: LanguageModel,
    optimizer: nnx.Optimizer,
    inputs: jax.Array,
    targets: jax.Array,
    state: Any = None,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """One step of training: the mean loss per valid token, in nats, and the state at the end."""
    state = jax.lax.stop_gradient(state)  # Truncation: the chunk before is out of reach.

    def loss_fn(model: LanguageModel) -> tuple[jax.Array, Any]:
        scores, new_state = model(inputs, state, mask)
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, targets)
        return jnp.mean(losses, where=mask), new_state

    (loss, state), gradients = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, gradients)
    return loss, state


@nnx.jit
def chunk_loss(
    model: LanguageModel, inputs: jax.Array, targets: jax.Array, state: Any, mask: jax.Array
) -> tuple[jax.Array, Any]:
    """The summed loss of valid tokens, in nats, and the state at the end."""
    scores, state = model(inputs, state, mask)
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, targets)
    return jnp.sum(losses, where=mask), state


@partial(nnx.jit, static_argnames="steps")
def generate(
    model: LanguageModel,
    prompt: jax.Array,
    key: jax.Array,
    temperature: float,
    end: int,
    *,
    steps: int,
) -> jax.Array:
    """Continues prompts by up to `steps` tokens, each the input of the next step.

    Args:
      model: in evaluation mode.
      prompt: tokens `(T, batch)`.
      key: draws the tokens.
      temperature: 0 takes the most probable token, 1 draws from the model's own distribution.
      end: the token at which a row stops; -1, which is none, for rows that never do.
      steps: the loop's bound.

    Returns:
      Tokens `(steps, batch)`; everything after a row's `end` is `end`.
    """

    def step(state: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
        scores, state = model(tokens[None], state)
        return state, scores[0]

    return seqjax.generate(
        step,
        model.initial_state(prompt.shape[1]),
        prompt,
        max_tokens=steps,
        key=key,
        temperature=temperature,
        stop_token=end,
        carry_axis=1,  # PyTorch's layout of states: (layers, batch, features).
    ).tokens


def count_reproduced(model: LanguageModel) -> int:
    """How many sequences greedy decoding gives back, end included, from their first token."""
    model.eval()
    firsts = jnp.array([[sequence[0] for sequence in text_data.SEQUENCES]], jnp.int32)
    steps = max(map(len, text_data.SEQUENCES))  # Just enough for the longest and its end.
    rows = generate(model, firsts, jax.random.key(0), 0.0, text_data.END, steps=steps).T.tolist()
    wanted = [[*sequence[1:], text_data.END] for sequence in text_data.SEQUENCES]
    return sum(row[: len(want)] == want for row, want in zip(rows, wanted, strict=True))


def train_toy(model: LanguageModel, args: argparse.Namespace) -> tuple[int, list[float]]:
    """Trains until all sequences are reproduced, or at most for `args.epochs`.

    Returns:
      How many are reproduced, and the loss in each epoch.
    """
    inputs, targets, mask = text_data.toy_batch()
    optimizer = make_optimizer(model, args.learning_rate, args.clip)
    reproduced, losses = 0, []
    for epoch in reporting.progress(range(1, args.epochs + 1), "training"):
        model.train()
        loss, _ = train_step(model, optimizer, inputs, targets, mask=mask)
        losses.append(float(loss))
        if epoch % CHECK_EVERY == 0 or epoch == args.epochs:
            reproduced = count_reproduced(model)
            print(f"epoch {epoch}: loss {losses[-1]:.4f}, {reproduced} reproduced", flush=True)
            if reproduced == len(text_data.SEQUENCES):
                break
    return reproduced, losses


def run_toy(args: argparse.Namespace, dtypes: options.DTypes) -> int:
    """Trains on the sequences; the exit status says whether all are reproduced."""
    model = LanguageModel(text_data.TOY_VOCABULARY, args, dtypes, nnx.Rngs(args.seed))
    reproduced, losses = train_toy(model, args)
    plots.save_curves(args.out / "curves.png", {"loss": {"train": losses}})
    print(f"{reproduced} of {len(text_data.SEQUENCES)} sequences reproduced")
    return 0 if reproduced == len(text_data.SEQUENCES) else 1


def bits_per_character(model: LanguageModel, ids: np.ndarray, batch_size: int, bptt: int) -> float:
    """Evaluates on a text, every stream from its beginning to its end with one running state."""
    model.eval()
    state, total = model.initial_state(batch_size), 0.0
    for inputs, targets, mask in zip(*text_data.into_chunks(ids, batch_size, bptt), strict=True):
        loss, state = chunk_loss(model, inputs, targets, state, mask)
        total += float(loss)
    return total / (len(ids) - 1) / math.log(2)


def train_text(
    model: LanguageModel, train_ids: np.ndarray, held_out_ids: np.ndarray, args: argparse.Namespace
) -> dict[str, list[float]]:
    """Trains, printing a line per epoch, and returns the curves."""
    # Without the last, ragged chunk no mask is needed, which leaves every fast path open.
    chunks = zip(*text_data.into_chunks(train_ids, args.batch_size, args.bptt), strict=True)
    chunks = [(inputs, targets) for inputs, targets, mask in chunks if mask.all()]
    steps = args.epochs * len(chunks)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, warmup_steps=min(100, steps // 10), decay_steps=steps
    )
    optimizer = make_optimizer(model, schedule, args.clip)
    train, held_out = [], []
    for epoch in range(1, args.epochs + 1):
        model.train()
        state, losses, start = model.initial_state(args.batch_size), [], time.perf_counter()
        bar = reporting.progress(chunks, f"epoch {epoch}")
        for inputs, targets in bar:
            loss, state = train_step(model, optimizer, inputs, targets, state)
            losses.append(float(loss))
            speed = len(losses) * inputs.size / (time.perf_counter() - start)
            bar.set_postfix_str(f"{speed:,.0f} characters/s", refresh=False)
        train.append(float(np.mean(losses)) / math.log(2))
        held_out.append(bits_per_character(model, held_out_ids, args.batch_size, args.bptt))
        print(
            f"epoch {epoch}/{args.epochs}: {train[-1]:.3f} bits per character in training, "
            f"{held_out[-1]:.3f} held out, {speed:,.0f} characters/s",
            flush=True,
        )
    return {"train": train, "held out": held_out}


def run_text(args: argparse.Namespace, dtypes: options.DTypes, text: str) -> int:
    """Trains a character model, measures it on held-out text and lets it write."""
    ids, vocabulary = text_data.encode(text)
    train_ids, held_out_ids = np.split(ids, [len(ids) * 9 // 10])
    print(
        f"{len(train_ids):,} characters to train on, {len(held_out_ids):,} held out, "
        f"{len(vocabulary)} different ones"
    )
    model = LanguageModel(len(vocabulary), args, dtypes, nnx.Rngs(args.seed))
    curves = train_text(model, train_ids, held_out_ids, args)
    plots.save_curves(args.out / "curves.png", {"bits per character": curves})

    # What comes first in the held-out text sets the scene.
    prompt, key = held_out_ids[: args.bptt, None], jax.random.key(args.seed)
    sample = generate(model, prompt, key, args.temperature, -1, steps=args.sample_length)
    print(f"\na sample at temperature {args.temperature}:\n")
    print("".join(vocabulary[token] for token in sample[:, 0].tolist()))
    return 0


def number(above: float, below: float = math.inf) -> Callable[[str], float]:
    """For `add_argument(type=…)`: a float between two bounds, the lower one included."""

    def convert(text: str) -> float:
        if not above <= (value := float(text)) < below:
            raise argparse.ArgumentTypeError(f"expected {above} <= number < {below}, got {text}")
        return value

    return convert


def parse(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The options, with the defaults that fit what is to be run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--toy", action="store_true", help="memorise ten sequences")
    what.add_argument("--text", type=Path, help="UTF-8 file to train on; default: Python's library")
    for name, kind, about in [
        ("cell", str, "kind of recurrent layer"),
        ("embedding_size", options.at_least(1), "features of the embedding"),
        ("hidden_size", options.at_least(1), "features of the state"),
        ("num_layers", options.at_least(1), "recurrent layers, one after the other"),
        ("dropout", number(0, 1), "probability, before, between and after the layers"),
        ("epochs", options.at_least(1), "passes over the data; the toy stops when it can"),
        ("learning_rate", number(0), "Adam's; the highest, where it follows a schedule"),
        ("clip", number(0), "largest norm of the gradient"),
        ("batch_size", options.at_least(1), "streams that the text is cut into"),
        ("bptt", options.at_least(1), "steps of a chunk, through which gradients flow"),
        ("temperature", number(0), "of the sample: 0 repeats the likely, 1 is true to the model"),
        ("sample_length", options.at_least(1), "characters of the sample"),
    ]:
        default = f"{TEXT[name]}, with --toy {TOY[name]}" if name in TOY else TEXT[name]
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=kind,
            choices=CELLS if name == "cell" else None,
            help=f"{about} (default: {default})",
        )
    options.add_common_arguments(parser)
    args = parser.parse_args(argv)
    defaults = TEXT | (TOY if args.toy else {})
    if args.smoke:
        defaults |= TOY_SMOKE if args.toy else TEXT_SMOKE
    given = {name: value for name, value in vars(args).items() if value is not None}
    return parser, argparse.Namespace(**vars(args) | defaults | given)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    parser, args = parse(argv)
    if args.toy:
        return run_toy(args, options.configure(args))
    try:
        limit = SMOKE_CHARACTERS if args.smoke else None
        text = text_data.load(args.text, limit, args.batch_size, args.bptt)
    except text_data.TextError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return run_text(args, options.configure(args), text)


if __name__ == "__main__":
    sys.exit(main())
