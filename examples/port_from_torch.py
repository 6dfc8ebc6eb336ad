"""Ports a PyTorch classifier of sequences to seqjax, weights included, and proves them equal.

    pip install torch==2.13.0
    python examples/port_from_torch.py

Read the two classes below side by side. They classify sequences of unequal length with a
bidirectional LSTM of two layers. What changes on the way from PyTorch:

- No packing: `lengths=` goes to the layer. It may be traced, in any order, and contain 0; what
  stands in the padding does not matter. States come back in PyTorch's order.
- `LSTM.from_torch` takes configuration and weights together. `torch.nn.Linear` keeps its weight
  as (out, in) and Flax its kernel as (in, out): transpose it.
- In Flax NNX a layer is made with `rngs`, which draws its first weights.

The program prints the largest differences of outputs and gradients, and fails if one is above
the tolerance.
"""

import argparse
import sys
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import seqjax.nnx

TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-3, "float16": 3e-4}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default: 0)")
    parser.add_argument("--smoke", action="store_true", help="accepted; it takes seconds anyway")
    parser.add_argument(
        "--dtype",
        choices=TOLERANCES,
        default="float32",
        help="dtype that seqjax's LSTM computes in, beside PyTorch in float32",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help=f"largest difference allowed (default: by dtype, {TOLERANCES})",
    )
    return parser


try:
    import torch
    from torch.nn.utils.rnn import pack_padded_sequence
except ImportError:
    parser = make_parser()
    parser.parse_args()  # --help needs no PyTorch.
    parser.error("PyTorch is needed: pip install torch==2.13.0")


class TorchClassifier(torch.nn.Module):
    def __init__(self, features: int, hidden_size: int, classes: int) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(
            features, hidden_size, num_layers=2, batch_first=True, bidirectional=True
        )
        self.classify = torch.nn.Linear(2 * hidden_size, classes)

    def forward(self, inputs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
        _, (h_n, _) = self.lstm(packed)
        # The last two states are the last layer's: forward, and backward.
        return self.classify(torch.cat([h_n[-2], h_n[-1]], dim=-1))


class Classifier(nnx.Module):
    def __init__(self, features: int, hidden_size: int, classes: int, *, rngs: nnx.Rngs) -> None:
        self.lstm = seqjax.nnx.LSTM(
            features, hidden_size, num_layers=2, batch_first=True, bidirectional=True, rngs=rngs
        )
        self.classify = nnx.Linear(2 * hidden_size, classes, rngs=rngs)

    def __call__(self, inputs: jax.Array, lengths: jax.Array) -> jax.Array:
        _, (h_n, _) = self.lstm(inputs, lengths=lengths)
        return self.classify(jnp.concatenate([h_n[-2], h_n[-1]], axis=-1))

    @classmethod
    def from_torch(cls, theirs: TorchClassifier, dtype: jnp.dtype | None = None) -> Self:
        """A classifier with the weights of PyTorch's, copied; its LSTM computes in `dtype`."""
        linear = theirs.classify
        ours = cls(
            theirs.lstm.input_size, theirs.lstm.hidden_size, linear.out_features, rngs=nnx.Rngs(0)
        )
        ours.lstm = seqjax.nnx.LSTM.from_torch(theirs.lstm)
        ours.lstm.dtype = dtype  # As under torch.autocast: the weights stay as they are.
        ours.classify.kernel[...] = jnp.array(linear.weight.detach().numpy().T)
        ours.classify.bias[...] = jnp.array(linear.bias.detach().numpy())
        return ours

    def torch_state_dict(self) -> dict[str, np.ndarray]:
        """The way back: what `TorchClassifier.load_state_dict` takes after `torch.from_numpy`."""
        lstm = {f"lstm.{name}": array for name, array in self.lstm.torch_state_dict().items()}
        return lstm | {
            "classify.weight": np.array(self.classify.kernel[...].T),
            "classify.bias": np.array(self.classify.bias[...]),
        }


Results = dict[str, np.ndarray]


def run_torch(
    model: TorchClassifier, inputs: np.ndarray, lengths: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, Results]:
    """Outputs, and the loss's gradients by name."""
    x = torch.from_numpy(inputs).requires_grad_()
    logits = model(x, torch.from_numpy(lengths))
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return logits.detach().numpy(), gradients | {"inputs": x.grad.numpy()}


def run_seqjax(
    model: Classifier, inputs: np.ndarray, lengths: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, Results]:
    """The same of the other model, compiled, under the same names."""

    def loss(model: Classifier, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model(inputs, jnp.asarray(lengths))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels))
        return losses.mean(), logits

    gradient = nnx.jit(nnx.grad(loss, argnums=(0, 1), has_aux=True))
    # By itself JAX multiplies with fewer bits on GPUs and TPUs.
    with jax.default_matmul_precision("highest"):
        (of_model, of_inputs), logits = gradient(model, jnp.asarray(inputs))
    # Gradients have the model's structure, so a model made of them gives them PyTorch's names.
    named = nnx.merge(nnx.graphdef(model), of_model).torch_state_dict()
    return np.asarray(logits), named | {"inputs": np.asarray(of_inputs)}


def largest_difference(ours: Results, theirs: Results) -> float:
    """Over all entries, which must have the same names."""
    if ours.keys() != theirs.keys():
        raise ValueError(f"names differ: {sorted(ours)} and {sorted(theirs)}")
    # NumPy's max, unlike Python's, lets a NaN through.
    return float(np.max([np.abs(ours[name] - theirs[name]).max() for name in ours]))


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error(f"argument --seed: expected at least 0, got {args.seed}")
    tolerance = TOLERANCES[args.dtype] if args.tolerance is None else args.tolerance

    batch, steps, features, classes = 16, 30, 10, 4
    rng = np.random.default_rng(args.seed)
    inputs = rng.standard_normal((batch, steps, features), np.float32)
    lengths = rng.integers(1, steps + 1, batch)  # PyTorch takes no 0; seqjax does.
    labels = rng.integers(0, classes, batch)

    torch.manual_seed(args.seed)
    theirs = TorchClassifier(features, hidden_size=32, classes=classes)
    ours = Classifier.from_torch(theirs, jnp.dtype(args.dtype))
    their_outputs, their_gradients = run_torch(theirs, inputs, lengths, labels)
    our_outputs, our_gradients = run_seqjax(ours, inputs, lengths, labels)

    outputs = largest_difference({"outputs": our_outputs}, {"outputs": their_outputs})
    gradients = largest_difference(our_gradients, their_gradients)
    print(f"largest difference: outputs {outputs:.1e}, gradients {gradients:.1e}")
    if not (outputs <= tolerance and gradients <= tolerance):  # NaN included.
        print(f"above the tolerance of {tolerance:.1e}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
