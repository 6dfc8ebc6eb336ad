"""The language model of language_model.py: an embedding, recurrent layers and a readout.

What is here needs no training loop: the network, its loss on a text, and writing with it.
"""

import argparse
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import options
from flax import nnx

import seqjax
import seqjax.nnx

CELLS = {"lstm": seqjax.nnx.LSTM, "gru": seqjax.nnx.GRU, "rnn": seqjax.nnx.RNN}
LARGEST = 700.0  # Nats that exp can take, and what stands for NaN, where training has diverged.
EVALUATION_STEPS = 512  # Of one call; enough to keep a machine busy at one row.


class LanguageModel(nnx.Module):
    """Scores of the next token after each token of a sequence.

    Args:
      vocabulary_size: how many tokens there are.
      cell: a name in `CELLS`.
      embedding_size, hidden_size, num_layers: of the network.
      dropout: probability, on connections that do not go through time (Zaremba et al. 2014):
        before, between and after the recurrent layers.
      tie_embeddings: the readout's weights are the embeddings (Press & Wolf 2017); the two sizes
        have to be equal.
      dtypes: of the recurrence and the parameters.
      rngs: draws the parameters.
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        cell: str,
        embedding_size: int,
        hidden_size: int,
        num_layers: int,
        dropout: float,
        tie_embeddings: bool,
        dtypes: options.DTypes,
        rngs: nnx.Rngs,
    ) -> None:
        # Both ends in the parameters' dtype: the loss sums over the vocabulary, too much for 16
        # bits, and the recurrent layers cast what they take themselves.
        ends = {"dtype": dtypes.params, "param_dtype": dtypes.params, "rngs": rngs}
        self.embedding = nnx.Embed(vocabulary_size, embedding_size, **ends)
        self.recurrent = CELLS[cell](
            embedding_size,
            hidden_size,
            num_layers,
            # As in PyTorch it acts between layers, with a warning where there is only one.
            dropout=dropout if num_layers > 1 else 0.0,
            dtype=dtypes.compute,
            param_dtype=dtypes.params,
            rngs=rngs,
        )
        self.recurrent.rngs = None  # Each call has its key: no random state to save with weights.
        self.dropout = nnx.Dropout(dropout)
        if tie_embeddings:
            self.readout = None
            self.bias = nnx.Param(jnp.zeros(vocabulary_size, dtypes.params))
        else:
            self.readout = nnx.Linear(hidden_size, vocabulary_size, **ends)

    def __call__(
        self,
        tokens: jax.Array,
        state: Any = None,
        *,
        mask: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Scores the next tokens.

        Args:
          tokens: int `(T, batch)`.
          state: that a call before returned; None means zeros.
          mask: bool `(T, batch)`, True at tokens that are not padding.
          key: draws dropout; None means none, for evaluation.

        Returns:
          Scores `(T, batch, vocabulary)` and the last state.
        """
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        evaluating = {"deterministic": key is None}
        inputs = self.dropout(self.embedding(tokens), rngs=keys[0], **evaluating)
        output, state = self.recurrent(inputs, state, mask=mask, rngs=keys[1], **evaluating)
        output = self.dropout(output, rngs=keys[2], **evaluating)
        if self.readout is None:
            return self.embedding.attend(output) + self.bias[...][None, None], state
        return self.readout(output), state

    def initial_state(self, batch_size: int) -> Any:
        """Zeros that look like the state that a call returns, so that all chunks compile once."""
        tokens = jnp.zeros((1, batch_size), jnp.int32)
        _, state = jax.eval_shape(lambda: self(tokens))
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)


def build(vocabulary_size: int, args: argparse.Namespace, dtypes: options.DTypes) -> LanguageModel:
    """The untrained model that the options ask for."""
    rngs = nnx.Rngs(args.seed)
    model = LanguageModel(vocabulary_size, **network_options(args), dtypes=dtypes, rngs=rngs)
    if args.init_range is not None:
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(partial(_uniform, args.init_range, rngs), params))
    return model


def network_options(args: argparse.Namespace) -> dict[str, Any]:
    """Of the options those that say what network it is, by which a checkpoint is read again."""
    names = ["cell", "embedding_size", "hidden_size", "num_layers", "dropout", "tie_embeddings"]
    return {name: getattr(args, name) for name in names}


def _uniform(bound: float, rngs: nnx.Rngs, like: jax.Array) -> jax.Array:
    return jax.random.uniform(rngs.params(), like.shape, like.dtype, -bound, bound)


@nnx.jit
def token_losses(
    model: LanguageModel, inputs: jax.Array, targets: jax.Array, state: Any
) -> tuple[jax.Array, Any]:
    """Each target's loss `(T, batch)`, in nats and without dropout, and the state at the end."""
    scores, state = model(inputs, state)
    return optax.softmax_cross_entropy_with_integer_labels(scores, targets), state


def mean_loss(model: LanguageModel, ids: np.ndarray, steps: int = EVALUATION_STEPS) -> float:
    """Nats per token of a text, read as one stream from its beginning to its end.

    One running state goes through all of it, so that each token but the first is predicted once,
    from all that is before it. How the text is cut makes no difference.

    Args:
      model: the model.
      ids: tokens `(length,)`, at least 2.
      steps: of one call.
    """
    predicted = len(ids) - 1
    padded = np.pad(ids, (0, -predicted % steps))
    # Where the model is, as states that come out of a call are: another place compiles again.
    place = model.embedding.embedding[...].sharding
    state, losses = jax.device_put(model.initial_state(1), place), []
    for start in range(0, predicted, steps):
        inputs, targets = (padded[i : i + steps, None] for i in (start, start + 1))
        loss, state = token_losses(model, inputs, targets, state)
        losses.append(loss)
    # What is predicted from padding comes last, so that it is enough to leave it out here.
    return float(np.concatenate(losses)[:predicted].mean(dtype=np.float64))


def perplexity(nats: float) -> float:
    """Of a mean loss per token."""
    return math.exp(min(LARGEST, nats))


def bits(nats: float) -> float:
    """Of a mean loss per token."""
    return min(LARGEST, nats) / math.log(2)


METRICS = {"char": ("bits per character", bits), "word": ("perplexity", perplexity)}


@partial(nnx.jit, static_argnames=("length", "temperature", "top_k", "top_p"))
def write(
    model: LanguageModel,
    prompt: jax.Array,
    *,
    length: int,
    temperature: float,
    key: jax.Array | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | None = None,
) -> jax.Array:
    """Continues prompts `(T, batch)` token by token: `seqjax.generate` on this model.

    Returns:
      Tokens `(length, batch)`; everything after a row's `stop` is `stop`.
    """
    return seqjax.generate(
        partial(_step, model),
        model.initial_state(prompt.shape[1]),
        prompt,
        max_tokens=length,
        key=key,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_token=stop,
        carry_axis=1,  # PyTorch's layout of states: (layers, batch, features).
    ).tokens


@partial(nnx.jit, static_argnames=("length", "num_beams"))
def search(
    model: LanguageModel, prompt: jax.Array, *, length: int, num_beams: int, stop: int | None
) -> seqjax.Beams:
    """The likeliest continuations of prompts `(T, batch)`: `seqjax.beam_search` on this model."""
    return seqjax.beam_search(
        partial(_step, model),
        model.initial_state(prompt.shape[1]),
        prompt,
        max_tokens=length,
        num_beams=num_beams,
        stop_token=stop,
        carry_axis=1,
    )


def _step(model: LanguageModel, state: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
    scores, state = model(tokens[None], state)
    return state, scores[0]
