"""Writing sequences token by token: sampling and beam search, over any model that steps."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from seqjax.cells.base import exportable
from seqjax.decoding_arguments import (
    Axes,
    at_least,
    check_key,
    check_model,
    check_numbers,
    check_prompt,
    check_stop,
    map_rows,
)
from seqjax.ops.masking import where_valid
from seqjax.ops.precision import accumulation_dtype, widen
from seqjax.ops.sampling import draw
from seqjax.ops.sharding import around_steps

__all__ = ["Beams", "Generation", "beam_search", "generate"]
__dir__ = __all__.copy  # What dir() and tab completion show.

Step = Callable[[Any, jax.Array], tuple[Any, jax.Array]]
"""`(carry, token) -> (carry, logits)`: token int `(batch,)`, logits `(batch, vocabulary)`."""


@exportable
class Generation(NamedTuple):
    """What `generate` returns.

    A token's log-probability is the model's own, of `softmax(logits)`, before temperature, `top_k`
    and `top_p`: what vLLM calls `raw_logprobs`. A row's sum is `log P(tokens | prompt)`.
    """

    tokens: jax.Array  # (max_tokens, batch); after a row's stop token, that token again
    lengths: jax.Array  # (batch,): tokens of each row, its stop token included
    carry: Any  # the model's, after the last of each row's tokens: to go on from
    log_probabilities: jax.Array  # (max_tokens, batch); after a row's stop token, 0


@exportable
class Beams(NamedTuple):
    """What `beam_search` returns, best first; log-probabilities as in `Generation`."""

    tokens: jax.Array  # (max_tokens, batch, num_beams); after a stop token, that token again
    lengths: jax.Array  # (batch, num_beams): tokens, the stop token included
    scores: jax.Array  # (batch, num_beams); -inf where there are fewer sequences than beams
    log_probabilities: jax.Array  # (max_tokens, batch, num_beams); after a stop token, 0


@around_steps(tokens=1, lengths=0, log_probabilities=1)
def generate(
    step: Step,
    carry: Any,
    prompt: ArrayLike,
    *,
    max_tokens: int,
    key: jax.Array | None = None,
    temperature: ArrayLike = 1.0,
    top_k: int | None = None,
    top_p: ArrayLike | None = None,
    stop_token: ArrayLike | None = None,
    prompt_lengths: ArrayLike | None = None,
    carry_axis: Any = "first",
) -> Generation:
    """Continues prompts, each token drawn from the model's distribution and fed back to it.

    A token is drawn from `softmax(logits / temperature)`, cut to the `top_k` likeliest tokens and
    then to the fewest likeliest that hold `top_p` of what is left. One loop that ends when every
    row has its stop token. Call it inside of `jax.jit` to compile it once.

    Args:
      step: the model, `(carry, token) -> (carry, logits)`; the carry keeps shapes and dtypes.
      carry: its state before the prompt, a pytree of arrays.
      prompt: int `(P, batch)`, at least one token a row, as a start-of-sequence token.
      max_tokens: how many tokens to write at most, after the prompt.
      key: draws the tokens: the same key, the same tokens. Not needed at temperature 0.
      temperature: 1 draws from the model's distribution, less prefers the likely; 0 takes the
        likeliest token (greedy), infinity any that the logits do not exclude by -inf. One for all
        rows or `(batch,)`.
      top_k: how many of the likeliest tokens to choose from; of equally likely ones, all.
      top_p: nucleus sampling (Holtzman et al. 2020): their probability, in (0, 1]. One for all
        rows or `(batch,)`.
      stop_token: the token that ends a row, one for all or `(batch,)`; None: none does.
      prompt_lengths: int `(batch,)`, in 1..P, of prompts padded on the right.
      carry_axis: the axis of the rows in the leaves of the carry: 0 in seqjax's cells and layers,
        1 in the states of `seqjax.nnx.LSTM` and the like. None is for leaves without rows, such as
        a counter, which every step changes. A tree with the structure of the carry's outer part
        says it part by part, as `in_axes` of `jax.vmap` does. "first" means 0, and is an error
        where another axis has as many entries.

    Returns:
      A `Generation`.

    Raises:
      TypeError: tokens or lengths are not integers, or `step` changes the carry's dtypes.
      ValueError: a shape is wrong, a number out of range (noticed where it is not traced), a key
        missing, or it is not clear which axis of the carry the rows are on.

    >>> import jax, seqjax
    >>> cell = seqjax.GRUCell(4, 4)  # four tokens, one-hot in and scores out
    >>> params = cell.init(jax.random.key(0))
    >>> def step(carry, token):
    ...     return cell.step(params, carry, jax.nn.one_hot(token, 4))
    >>> written = seqjax.generate(
    ...     step, cell.initial_carry((2,)), [[1, 2]], max_tokens=5, temperature=0.0)
    >>> written.tokens.shape, written.lengths.tolist()
    ((5, 2), [5, 5])
    """
    prompt, mask = check_prompt(prompt, prompt_lengths)
    batch = prompt.shape[1]
    max_tokens = at_least("max_tokens", max_tokens, 0)
    if top_k is not None:
        top_k = at_least("top_k", top_k, 1)
    if key is not None:
        check_key(key)
    carry, axes, abstract_logits = check_model(step, carry, prompt, carry_axis)
    stop = check_stop(stop_token, prompt, abstract_logits.shape[1])
    dtype = accumulation_dtype(abstract_logits.dtype)
    check = functools.partial(check_numbers, batch=batch, dtype=dtype)
    temperatures = check("temperature", temperature, "at least 0", lambda t: t >= 0)
    share = None
    if top_p is not None:
        share = check("top_p", top_p, "in (0, 1]", lambda p: (p > 0) & (p <= 1))
    greedy = isinstance(temperatures, np.ndarray) and not temperatures.any()
    if key is None and not greedy:
        raise ValueError("generate needs a key to draw tokens with: pass key, or temperature=0.0")

    def choose(index: jax.Array, logits: jax.Array) -> jax.Array:
        if greedy or key is None:  # Checked above: without a key the temperature is 0.
            return jnp.argmax(logits, axis=-1)
        return draw(jax.random.fold_in(key, index), logits, temperatures, top_k, share)

    def unfinished(loop: Any) -> jax.Array:
        index, _, ended, _ = loop
        return (index < max_tokens) & ~jnp.all(ended)

    def write_one(loop: Any) -> Any:
        index, logits, ended, written = loop
        logits = widen(logits)
        token = choose(index, logits)
        log_probability = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)
        token = token.astype(prompt.dtype)
        token = token if stop is None else jnp.where(ended, stop, token)
        carry, logits = step(written.carry, token)
        written = Generation(
            tokens=written.tokens.at[index].set(token),
            lengths=jnp.where(ended, written.lengths, index + 1),
            carry=_where_valid(axes, ~ended, carry, written.carry),
            log_probabilities=written.log_probabilities.at[index].set(
                jnp.where(ended, 0, log_probability[:, 0])
            ),
        )
        ended = ended if stop is None else ended | (token == stop)
        return index + 1, logits, ended, written

    carry, logits = _read_prompt(step, carry, axes, abstract_logits, prompt, mask)
    shape = (max_tokens, batch)
    written = Generation(
        tokens=_blank(stop, shape, prompt.dtype),
        lengths=jnp.zeros(batch, jnp.int32),
        carry=carry,
        log_probabilities=jnp.zeros(shape, dtype),
    )
    start = (jnp.int32(0), logits, jnp.zeros(batch, bool), written)
    return (lax.while_loop(unfinished, write_one, start) if max_tokens else start)[-1]


@around_steps(tokens=1, lengths=0, scores=0, log_probabilities=1)
def beam_search(
    step: Step,
    carry: Any,
    prompt: ArrayLike,
    *,
    max_tokens: int,
    num_beams: int,
    stop_token: ArrayLike | None = None,
    length_penalty: ArrayLike = 0.0,
    prompt_lengths: ArrayLike | None = None,
    carry_axis: Any = "first",
) -> Beams:
    """Continues prompts by the likeliest sequences that a beam finds.

    A sequence is complete at its stop token, or at `max_tokens`. Its score is
    `log P(tokens | prompt) / ((5 + length) / 6) ** length_penalty` (Wu et al. 2016), its length
    counting the stop token. A row is done when nothing that is still open can score better than
    its `num_beams` complete sequences.

    Args:
      step: the model, as in `generate`. It is called on `batch * num_beams` rows.
      carry: its state before the prompt, for `batch` rows.
      prompt: as in `generate`.
      max_tokens: how many tokens to write at most.
      num_beams: how many sequences are kept, open and complete ones each.
      stop_token: as in `generate`.
      length_penalty: 0 scores by probability, which favours short sequences; more, longer ones.
        One for all rows or `(batch,)`.
      prompt_lengths: as in `generate`.
      carry_axis: as in `generate`.

    Returns:
      `Beams`.

    Raises:
      TypeError: tokens or lengths are not integers, or `step` changes the carry's dtypes.
      ValueError: as in `generate`.

    >>> import jax, seqjax
    >>> cell = seqjax.GRUCell(4, 4)
    >>> params = cell.init(jax.random.key(0))
    >>> def step(carry, token):
    ...     return cell.step(params, carry, jax.nn.one_hot(token, 4))
    >>> beams = seqjax.beam_search(
    ...     step, cell.initial_carry((2,)), [[1, 2]], max_tokens=5, num_beams=3, stop_token=0)
    >>> beams.tokens.shape, beams.scores.shape
    ((5, 2, 3), (2, 3))
    """
    prompt, mask = check_prompt(prompt, prompt_lengths)
    batch = prompt.shape[1]
    max_tokens = at_least("max_tokens", max_tokens, 0)
    num_beams = at_least("num_beams", num_beams, 1)
    carry, axes, abstract_logits = check_model(step, carry, prompt, carry_axis)
    vocabulary = abstract_logits.shape[1]
    if vocabulary < 2:
        raise ValueError(
            f"logits should be over at least 2 tokens, got shape: {abstract_logits.shape}"
        )
    stop = check_stop(stop_token, prompt, vocabulary)
    dtype = accumulation_dtype(abstract_logits.dtype)
    length_penalty = check_numbers(
        "length_penalty", length_penalty, "at least 0", lambda p: p >= 0, batch=batch, dtype=dtype
    )
    first_of_row = num_beams * jnp.arange(batch, dtype=jnp.int32)[:, None]

    def score(log_probability: jax.Array, length: ArrayLike) -> jax.Array:
        divisor = ((5 + jnp.asarray(length, dtype)) / 6) ** length_penalty
        # What is impossible stays so, be the divisor infinite.
        return jnp.where(jnp.isneginf(log_probability), -jnp.inf, log_probability / divisor)

    def unfinished(loop: Any) -> jax.Array:
        index, _, _, going_on, complete = loop
        # Probabilities only fall: no open sequence ends with more than this.
        best_open = score(going_on.scores.max(axis=-1, keepdims=True), max_tokens)
        return (index < max_tokens) & ~jnp.all(
            complete.scores.min(axis=-1, keepdims=True) >= best_open
        )

    def write_one(loop: Any) -> Any:
        index, carry, logits, going_on, complete = loop
        log_probabilities = jax.nn.log_softmax(widen(logits)).reshape(batch, num_beams, vocabulary)
        longer = going_on.scores[..., None] + log_probabilities
        # Of each beam's continuations one at most ends: half of twice as many go on.
        best, where = lax.top_k(longer.reshape(batch, -1), 2 * num_beams)
        parent, token = where // vocabulary, (where % vocabulary).astype(prompt.dtype)
        before = _take_beams(going_on, parent)
        candidates = Beams(
            tokens=before.tokens.at[index].set(token),
            lengths=before.lengths + 1,
            scores=best,
            log_probabilities=before.log_probabilities.at[index].set(
                jnp.take_along_axis(log_probabilities.reshape(batch, -1), where, axis=-1)
            ),
        )
        ends = jnp.zeros_like(token, bool) if stop is None else token == stop[:, None]
        ended = candidates._replace(scores=jnp.where(ends, score(best, index + 1), -jnp.inf))
        complete = _best(num_beams, complete, ended)
        open_scores, kept = lax.top_k(jnp.where(ends, -jnp.inf, best), num_beams)
        going_on = _take_beams(candidates, kept)._replace(scores=open_scores)
        parent, token = (jnp.take_along_axis(a, kept, axis=-1) for a in (parent, token))
        rows = (parent + first_of_row).reshape(-1)
        carry, logits = step(_take_rows(axes, carry, rows), token.reshape(-1))
        return index + 1, carry, logits, going_on, complete

    carry, logits = _read_prompt(step, carry, axes, abstract_logits, prompt, mask)
    shape = (max_tokens, batch, num_beams)
    impossible = Beams(
        tokens=_blank(None if stop is None else stop[:, None], shape, prompt.dtype),
        lengths=jnp.zeros(shape[1:], jnp.int32),
        scores=jnp.full(shape[1:], -jnp.inf, dtype),
        log_probabilities=jnp.zeros(shape, dtype),
    )
    # All beams start alike: one of them alone is open, the others are impossible.
    alone = impossible._replace(scores=impossible.scores.at[:, 0].set(0))
    row_of_beam = jnp.repeat(jnp.arange(batch), num_beams)
    carry = _take_rows(axes, carry, row_of_beam)
    start = (jnp.int32(0), carry, logits[row_of_beam], alone, impossible)
    end = lax.while_loop(unfinished, write_one, start) if max_tokens else start
    index, _, _, going_on, complete = end
    cut_off = jnp.where(index == max_tokens, score(going_on.scores, max_tokens), -jnp.inf)
    return _best(num_beams, complete, going_on._replace(scores=cut_off))


def _best(number: int, *beams: Beams) -> Beams:
    """The best of several sets of sequences, best first."""
    both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *beams)
    scores, where = lax.top_k(both.scores, number)
    return _take_beams(both, where)._replace(scores=scores)


def _take_beams(beams: Beams, where: jax.Array) -> Beams:
    """Of each row, the beams at the indices `(batch, number)`."""

    def take(leaf: jax.Array) -> jax.Array:
        over_time = tuple(range(leaf.ndim - where.ndim))
        return jnp.take_along_axis(leaf, jnp.expand_dims(where, over_time), axis=-1)

    return jax.tree.map(take, beams)


def _read_prompt(
    step: Step,
    carry: Any,
    axes: Axes,
    logits: jax.ShapeDtypeStruct,
    prompt: jax.Array,
    mask: jax.Array | None,
) -> tuple[Any, jax.Array]:
    """The carry after each row's prompt, and the logits of the token that follows."""

    def read_one(loop: Any, inputs: Any) -> Any:
        token, valid = inputs
        carry, logits = step(loop[0], token)
        if valid is not None:
            carry = _where_valid(axes, valid, carry, loop[0])
            logits = where_valid(valid, logits, loop[1])
        return (carry, logits), None

    start = carry, jnp.zeros(logits.shape, logits.dtype)
    return lax.scan(read_one, start, (prompt, mask))[0]


def _where_valid(axes: Axes, valid: jax.Array, carry: Any, otherwise: Any) -> Any:
    def choose(axis: int, leaf: jax.Array, other: jax.Array) -> jax.Array:
        return where_valid(valid, leaf, other, axis)

    return map_rows(choose, axes, carry, otherwise)


def _take_rows(axes: Axes, carry: Any, rows: jax.Array) -> Any:
    return map_rows(lambda axis, leaf: jnp.take(leaf, rows, axis=axis), axes, carry)


def _blank(stop: jax.Array | None, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Tokens before they are written: a row that ends early keeps its stop token."""
    return jnp.zeros(shape, dtype) if stop is None else jnp.broadcast_to(stop, shape)
