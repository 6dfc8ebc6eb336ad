"""The options of language_model.py, with the defaults that fit what is to be run."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import language_network
import text_data
from common import options

# Defaults at the level of characters; what is different for words; for the toy; and for a run of
# seconds. Gradients are those of a chunk's loss summed over its steps, which `clip` is large for.
TEXT = {"cell": "lstm", "embedding_size": 64, "hidden_size": 256, "num_layers": 1, "dropout": 0.0}
TEXT |= {"tie_embeddings": False, "init_range": None, "vocabulary_size": None}
TEXT |= {"epochs": 5, "patience": None, "batch_size": 32, "bptt": 64, "optimizer": "adam"}
TEXT |= {"learning_rate": 4e-3, "schedule": "cosine", "decay": 0.5, "decay_after": 1, "clip": 64.0}
TEXT |= {"temperature": 0.7, "sample_length": 600}
WORD = {"embedding_size": 200, "hidden_size": 200, "dropout": 0.5, "tie_embeddings": True}
WORD |= {"epochs": 20, "batch_size": 20, "bptt": 35, "learning_rate": 4e-3, "clip": 5.0}
WORD |= {"temperature": 1.0, "sample_length": 100}
SMOKE = {"embedding_size": 64, "hidden_size": 64, "epochs": 2, "batch_size": 8, "bptt": 25}
SMOKE |= {"learning_rate": 1e-2, "sample_length": 80}
SMOKE_CHARACTERS = 20_000
TOY = {"cell": "gru", "embedding_size": 256, "hidden_size": 512, "epochs": 1000}
TOY |= {"learning_rate": 1e-3, "clip": 1.0}
TOY_SMOKE = {"embedding_size": 64, "hidden_size": 128, "learning_rate": 1e-2}

# What the toy would not look at.
NOT_OF_THE_TOY = ["level", "text", "train", "valid", "test", "preset", "vocabulary_size"]
NOT_OF_THE_TOY += ["patience", "batch_size", "bptt", "optimizer", "schedule", "decay"]
NOT_OF_THE_TOY += ["decay_after", "temperature", "sample_length", "checkpoint_dir", "log_dir"]
NOT_OF_THE_TOY += ["devices", "coordinator", "num_processes", "process_id"]

# What it means that an option has no default.
NONE_MEANS = {
    "vocabulary_size": "all, but words that occur twice where the text has no <unk>",
    "init_range": "as the layers do by themselves",
    "patience": "never",
}

# The three networks of Zaremba, Sutskever & Vinyals 2014, which are for words of the Penn Treebank.
ZAREMBA = {"cell": "lstm", "num_layers": 2, "tie_embeddings": False, "vocabulary_size": 10_000}
ZAREMBA |= {"optimizer": "sgd", "learning_rate": 1.0, "schedule": "exponential", "batch_size": 20}
PRESETS = {
    "zaremba-small": ZAREMBA
    | {"embedding_size": 200, "hidden_size": 200, "dropout": 0.0, "bptt": 20, "init_range": 0.1}
    | {"clip": 5.0, "decay": 0.5, "decay_after": 4, "epochs": 13},
    "zaremba-medium": ZAREMBA
    | {"embedding_size": 650, "hidden_size": 650, "dropout": 0.5, "bptt": 35, "init_range": 0.05}
    | {"clip": 5.0, "decay": 0.8, "decay_after": 6, "epochs": 39},
    "zaremba-large": ZAREMBA
    | {"embedding_size": 1500, "hidden_size": 1500, "dropout": 0.65, "bptt": 35, "init_range": 0.04}
    | {"clip": 10.0, "decay": 1 / 1.15, "decay_after": 14, "epochs": 55},
}


def make_parser(description: str) -> argparse.ArgumentParser:
    """The options of training. Those with a default that depends are None until `parse`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = parser.add_argument_group("text")
    data.add_argument("--toy", action="store_true", help="memorise ten sequences instead")
    data.add_argument(
        "--level",
        choices=text_data.LEVELS,
        help="what is predicted (default: char, with presets word)",
    )
    data.add_argument(
        "--text", type=Path, help="UTF-8 file, to be split; default: Python's own sources or prose"
    )
    for name, about in [
        ("train", "UTF-8 file to train on, instead of --text"),
        ("valid", "UTF-8 file whose loss says which epoch was best; needed with --train"),
        ("test", "UTF-8 file that the best epoch is measured on"),
    ]:
        data.add_argument(f"--{name}", type=Path, metavar="FILE", help=about)
    _add(data, "vocabulary_size", options.at_least(2), "keep so many tokens, the most frequent")

    network = parser.add_argument_group("network")
    network.add_argument(
        "--preset", choices=PRESETS, help="settings as published; options beside it change them"
    )
    _add(network, "cell", str, "kind of recurrent layer", choices=language_network.CELLS)
    _add(network, "embedding_size", options.at_least(1), "features of the embedding")
    _add(network, "hidden_size", options.at_least(1), "features of the state")
    _add(network, "num_layers", options.at_least(1), "recurrent layers, one after the other")
    _add(
        network,
        "dropout",
        options.number(0, 1),
        "probability, before, between and after the layers",
    )
    network.add_argument(
        "--tie-embeddings",
        action=argparse.BooleanOptionalAction,
        help=f"read out with the embedding's weights (default: {_default('tie_embeddings')})",
    )
    _add(network, "init_range", options.positive, "parameters start uniform in ± this")

    training = parser.add_argument_group("training")
    _add(
        training,
        "epochs",
        options.at_least(1),
        "passes over the data, more of which may be asked of a finished run with checkpoints; a "
        "cosine is then that of the new number; the toy stops when it can",
    )
    _add(training, "patience", options.at_least(1), "stop after so many without improvement")
    _add(training, "batch_size", options.at_least(1), "streams that the text is cut into")
    _add(training, "bptt", options.at_least(1), "steps of a chunk, through which gradients flow")
    _add(training, "optimizer", str, "how gradients are followed", choices=["adam", "sgd"])
    _add(training, "learning_rate", options.number(0), "the highest, where it follows a schedule")
    _add(
        training,
        "schedule",
        str,
        "of the learning rate: to 0 after a warm-up (cosine), or by --decay (exponential)",
        choices=["constant", "cosine", "exponential"],
    )
    _add(training, "decay", options.number(0, 1), "factor per epoch")
    _add(training, "decay_after", options.at_least(1), "epochs without decay")
    _add(
        training, "clip", options.number(0), "largest norm of the gradient of a chunk's summed loss"
    )

    sample = parser.add_argument_group("sample")
    _add(sample, "temperature", options.number(0), "0 repeats the likely, 1 is true to the model")
    _add(sample, "sample_length", options.at_least(1), "tokens")
    options.add_common_arguments(parser)
    options.add_training_arguments(parser)
    return parser


def _add(group: argparse._ArgumentGroup, name: str, kind: Callable, about: str, **more) -> None:
    option = "--" + name.replace("_", "-")
    group.add_argument(option, type=kind, help=f"{about} (default: {_default(name)})", **more)


def _default(name: str) -> str:
    """A default in words, for the help."""
    words = str(TEXT[name]) if name not in NONE_MEANS else NONE_MEANS[name]
    for option, other in [("--level word", WORD), ("--toy", TOY)]:
        if name in other:
            words += f", with {option} {other[name]}"
    return words


def parse(
    description: str, argv: Sequence[str] | None
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Reads the command line; ends the program with status 2 where options do not go together."""
    parser = make_parser(description)
    args = parser.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if value is not None}
    if args.toy:
        for name in NOT_OF_THE_TOY:
            if name in given:
                option = "--" + name.replace("_", "-")
                parser.error(
                    f"argument {option}: not allowed with argument --toy, which learns one batch "
                    "on one device, in a minute"
                )
    if args.text and args.train:
        parser.error("argument --train: not allowed with argument --text, which is split itself")
    if args.train and not args.valid:
        parser.error("argument --train: needs --valid, to choose the best epoch by")
    for name in ("valid", "test"):
        if name in given and not args.train:
            parser.error(f"argument --{name}: needs --train; --text FILE alone is split by itself")

    level = args.level or ("word" if args.preset else "char")
    defaults = TEXT | {"level": level} | (WORD if level == "word" else {})
    defaults |= PRESETS[args.preset] if args.preset else {}
    defaults |= TOY if args.toy else {}
    if args.smoke:
        defaults |= TOY_SMOKE if args.toy else SMOKE
    args = argparse.Namespace(**vars(args) | defaults | given)

    if args.tie_embeddings and args.embedding_size != args.hidden_size:
        parser.error(
            "argument --tie-embeddings: the readout reads states with the weights of the "
            f"embedding, expected equal sizes, got --embedding-size {args.embedding_size} and "
            f"--hidden-size {args.hidden_size}: change one, or pass --no-tie-embeddings"
        )
    if args.schedule != "exponential":
        for name in {"decay", "decay_after"} & given.keys():
            option = "--" + name.replace("_", "-")
            parser.error(f"argument {option}: needs --schedule exponential, got {args.schedule}")
    return parser, args
