"""Writes text with a model that language_model.py has trained, from its checkpoint folder alone.

    python examples/language_model.py generate --checkpoint-dir DIR
    python examples/language_model.py generate --checkpoint-dir DIR --prompt "def " --top-p 0.9
    python examples/language_model.py generate --checkpoint-dir DIR --prompt "the" --beams 4

Tokens are drawn one by one; with --beams the likeliest ways to end the line are searched.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import language_network
import numpy as np
import text_data
from common import checkpoints, files, options, training
from flax import nnx

DESCRIPTION = "model.json"


def describe(folder: Path, args: argparse.Namespace, vocabulary: text_data.Vocabulary) -> None:
    """Writes down what a model is besides its weights, for `load`."""
    description = {
        "network": language_network.network_options(args),
        "dtype": args.dtype,
        "level": vocabulary.level,
        "tokens": vocabulary.tokens,
    }
    files.write(folder / DESCRIPTION, json.dumps(description))


def load(folder: Path) -> tuple[language_network.LanguageModel, text_data.Vocabulary]:
    """The best model in a checkpoint folder, and its vocabulary.

    Raises:
      CheckpointError: there is none, or it is damaged.
    """
    try:
        description = checkpoints.read_json(folder / DESCRIPTION)
    except OSError as error:
        raise checkpoints.CheckpointError(
            f"cannot read {folder / DESCRIPTION} ({error.strerror}): give the --checkpoint-dir of "
            "a run of language_model.py"
        ) from error
    vocabulary = text_data.Vocabulary(description["level"], description["tokens"])
    model = language_network.LanguageModel(
        len(vocabulary),
        **description["network"],
        dtypes=options.dtypes(description["dtype"]),
        rngs=nnx.Rngs(0),
    )
    training.load_best(folder, model)
    return model, vocabulary


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count = options.at_least(1)
    parser.add_argument("--checkpoint-dir", type=Path, required=True, help="that of the training")
    parser.add_argument("--prompt", help="text to go on from (default: the beginning of a line)")
    parser.add_argument("--length", type=count, default=200, help="tokens (default: %(default)s)")
    drawing = parser.add_argument_group("drawing")
    drawing.add_argument(
        "--temperature",
        type=options.number(0),
        help="0 takes the likeliest, 1 is true to the model (default: 1)",
    )
    drawing.add_argument("--top-k", type=count, help="draw from so many likeliest tokens")
    drawing.add_argument(
        "--top-p", type=_probability, help="draw from the likeliest, of this probability in all"
    )
    drawing.add_argument("--num-samples", type=count, help="how many texts (default: 1)")
    drawing.add_argument("--seed", type=options.at_least(0), help="of the draws (default: 0)")
    parser.add_argument("--beams", type=count, help="search with so many beams instead of drawing")
    return parser


def _probability(text: str) -> float:
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"expected 0 < number <= 1, got {text}")
    return value


def main(prog: str, argv: Sequence[str]) -> int:
    """Runs the subcommand; returns the exit status."""
    parser = make_parser(prog)
    args = parser.parse_args(argv)
    if args.beams:
        for name in ("temperature", "top_k", "top_p", "num_samples", "seed"):
            if getattr(args, name) is not None:
                option = "--" + name.replace("_", "-")
                parser.error(
                    f"argument {option}: not allowed with argument --beams, which draws nothing"
                )
    try:
        model, vocabulary = load(args.checkpoint_dir)
    except checkpoints.CheckpointError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    line_end = vocabulary.line_end()
    if args.prompt is None and line_end is None:
        parser.error("the model's text has no ends of lines to begin after: give --prompt")
    prompt = [line_end] if args.prompt is None else vocabulary.encode(args.prompt).tolist()
    if not prompt:
        parser.error("argument --prompt: expected at least one token, got none: leave it out")
    tokens = text_data.split(args.prompt or "", vocabulary.level)
    if unknown := sorted(set(tokens) - set(vocabulary.tokens)):
        stand_in = text_data.UNKNOWN[vocabulary.level]
        print(f"unknown to the model, read as {stand_in}: {' '.join(unknown)}", file=sys.stderr)

    for title, tokens in continuations(model, prompt, line_end, args):
        shown = tokens if args.prompt is None else prompt + tokens
        print(f"{title}{vocabulary.decode(shown)}")
    return 0


def continuations(
    model: language_network.LanguageModel,
    prompt: list[int],
    line_end: int | None,
    args: argparse.Namespace,
) -> list[tuple[str, list[int]]]:
    """Texts as tokens, each with a title to print before it."""
    prompts = np.array([prompt] * (args.num_samples or 1), np.int32).T
    if args.beams:
        beams = language_network.search(
            model, prompts, length=args.length, num_beams=args.beams, stop=line_end
        )
        rows = zip(beams.tokens[:, 0].T, beams.lengths[0], beams.scores[0], strict=True)
        return [
            (f"--- log probability {score:.2f}\n", tokens[:length].tolist())
            for tokens, length, score in rows
        ]
    texts = language_network.write(
        model,
        prompts,
        length=args.length,
        temperature=1.0 if args.temperature is None else args.temperature,
        key=jax.random.key(args.seed or 0),
        top_k=args.top_k,
        top_p=args.top_p,
    ).T.tolist()
    if len(texts) == 1:
        return [("", texts[0])]
    return [(f"--- sample {number}\n", text) for number, text in enumerate(texts, 1)]
