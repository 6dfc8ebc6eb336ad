"""Writing sequences token by token: sampling and beam search, over any model that steps."""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from seqjax.ops.masking import where_valid
from seqjax.ops.precision import widen
from seqjax.ops.sharding import around_steps
from seqjax.sequences import lengths_to_mask

__all__ = ["Beams", "Generation", "beam_search", "generate"]
__dir__ = __all__.copy  # What dir() and tab completion show.

Step = Callable[[Any, jax.Array], tuple[Any, jax.Array]]
"""`(carry, token) -> (carry, logits)`: token int `(batch,)`, logits `(batch, vocabulary)`."""


class Generation(NamedTuple):
    """What `generate` returns."""

    tokens: jax.Array  # (max_tokens, batch); after a row's stop token, that token again
    lengths: jax.Array  # (batch,): tokens of each row, its stop token included
    carry: Any  # the model's, after the last of each row's tokens: to go on from


class Beams(NamedTuple):
    """What `beam_search` returns, best first."""

    tokens: jax.Array  # (max_tokens, batch, num_beams); after a stop token, that token again
    lengths: jax.Array  # (batch, num_beams): tokens, the stop token included
    scores: jax.Array  # (batch, num_beams); -inf where there are fewer sequences than beams


@around_steps(tokens=1, lengths=0)
def generate(
    step: Step,
    carry: Any,
    prompt: ArrayLike,
    *,
    max_tokens: int,
    key: jax.Array | None = None,
    temperature: ArrayLike = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token: ArrayLike | None = None,
    prompt_lengths: ArrayLike | None = None,
    carry_axis: int = 0,
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
        likeliest token (greedy).
      top_k: how many of the likeliest tokens to choose from; of equally likely ones, all.
      top_p: nucleus sampling (Holtzman et al. 2020): their probability, in (0, 1].
      stop_token: the token that ends a row, one for all or `(batch,)`; None: none does.
      prompt_lengths: int `(batch,)`, in 1..P, of prompts padded on the right.
      carry_axis: the batch's axis in the leaves of the carry: 0 in seqjax's cells and layers, 1 in
        the states of `seqjax.nnx.LSTM` and the like.

    Returns:
      A `Generation`.

    Raises:
      TypeError: tokens or lengths are not integers, or `step` changes the carry's dtypes.
      ValueError: a shape or a number is out of range, or a key is missing.

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
    prompt, mask = _check_prompt(prompt, prompt_lengths)
    max_tokens = _at_least("max_tokens", max_tokens, 0)
    greedy = not isinstance(temperature, jax.core.Tracer) and bool(np.all(temperature == 0))
    if key is None and not greedy:
        raise ValueError("generate needs a key to draw tokens with: pass key, or temperature=0.0")
    if not isinstance(temperature, jax.core.Tracer) and np.any(np.asarray(temperature) < 0):
        raise ValueError(f"temperature should be at least 0, got: {temperature}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p should be in (0, 1], got: {top_p}")
    if top_k is not None:
        top_k = _at_least("top_k", top_k, 1)
    stop = _check_stop(stop_token, prompt)

    def choose(index: jax.Array, logits: jax.Array) -> jax.Array:
        likeliest = jnp.argmax(logits, axis=-1)
        if greedy or key is None:  # Checked above: without a key the temperature is 0.
            return likeliest
        draws = jnp.asarray(temperature) > 0
        divisor = jnp.where(draws, temperature, 1).astype(logits.dtype)
        kept = _keep_likely(logits / divisor, top_k, top_p)
        drawn = jax.random.categorical(jax.random.fold_in(key, index), kept)
        return jnp.where(draws, drawn, likeliest)

    def unfinished(loop: Any) -> jax.Array:
        index, _, _, _, _, ended = loop
        return (index < max_tokens) & ~jnp.all(ended)

    def write_one(loop: Any) -> Any:
        index, carry, logits, tokens, lengths, ended = loop
        token = choose(index, widen(logits)).astype(prompt.dtype)
        token = token if stop is None else jnp.where(ended, stop, token)
        new_carry, logits = step(carry, token)
        carry = where_valid(~ended, new_carry, carry, carry_axis)
        tokens = tokens.at[index].set(token)
        lengths = jnp.where(ended, lengths, index + 1)
        ended = ended if stop is None else ended | (token == stop)
        return index + 1, carry, logits, tokens, lengths, ended

    carry, logits = _read_prompt(step, carry, prompt, mask, carry_axis)
    batch = prompt.shape[1]
    tokens = jnp.zeros((max_tokens, batch), prompt.dtype) + (0 if stop is None else stop)
    start = (0, carry, logits, tokens, jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool))
    _, carry, _, tokens, lengths, _ = lax.while_loop(unfinished, write_one, start)
    return Generation(tokens, lengths, carry)


@around_steps(tokens=1, lengths=0, scores=0)
def beam_search(
    step: Step,
    carry: Any,
    prompt: ArrayLike,
    *,
    max_tokens: int,
    num_beams: int,
    stop_token: ArrayLike | None = None,
    length_penalty: float = 0.0,
    prompt_lengths: ArrayLike | None = None,
    carry_axis: int = 0,
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
      max_tokens: how many tokens to write at most, at least 1.
      num_beams: how many sequences are kept, open and complete ones each.
      stop_token: as in `generate`.
      length_penalty: 0 scores by probability, which favours short sequences; more, longer ones.
      prompt_lengths: as in `generate`.
      carry_axis: as in `generate`.

    Returns:
      `Beams`.

    Raises:
      TypeError: tokens or lengths are not integers, or `step` changes the carry's dtypes.
      ValueError: a shape or a number is out of range.

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
    prompt, mask = _check_prompt(prompt, prompt_lengths)
    max_tokens = _at_least("max_tokens", max_tokens, 1)
    num_beams = _at_least("num_beams", num_beams, 1)
    if length_penalty < 0:
        raise ValueError(f"length_penalty should be at least 0, got: {length_penalty}")
    stop = _check_stop(stop_token, prompt)
    batch = prompt.shape[1]
    carry, logits = _read_prompt(step, carry, prompt, mask, carry_axis)
    vocabulary = logits.shape[-1]
    if vocabulary < 2:
        raise ValueError(f"logits should be over at least 2 tokens, got shape: {logits.shape}")
    first_of_row = jnp.repeat(jnp.arange(batch), num_beams)
    take_rows = functools.partial(_take_rows, carry_axis)

    def score(log_probability: jax.Array, length: ArrayLike) -> jax.Array:
        return log_probability / ((5 + jnp.asarray(length)) / 6) ** length_penalty

    def unfinished(loop: Any) -> jax.Array:
        index, _, _, _, log_probabilities, complete = loop
        # Probabilities only fall: no open sequence ends with more than this.
        best_open = score(jnp.max(log_probabilities, axis=-1), max_tokens)
        return (index < max_tokens) & ~jnp.all(complete.scores.min(axis=-1) >= best_open)

    def write_one(loop: Any) -> Any:
        index, carry, logits, tokens, log_probabilities, complete = loop
        logits = widen(logits).reshape(batch, num_beams, vocabulary)
        longer = log_probabilities[..., None] + jax.nn.log_softmax(logits)
        # Of each beam's continuations one at most ends: half of twice as many go on.
        best, where = lax.top_k(longer.reshape(batch, -1), 2 * num_beams)
        parent, token = where // vocabulary, (where % vocabulary).astype(prompt.dtype)
        candidates = jnp.take_along_axis(tokens, parent[None], axis=-1).at[index].set(token)
        ends = jnp.zeros_like(token, bool) if stop is None else token == stop[:, None]
        ended = Beams(
            candidates,
            jnp.full(token.shape, index + 1, jnp.int32),
            jnp.where(ends, score(best, index + 1), -jnp.inf),
        )
        complete = _best(num_beams, complete, ended)
        log_probabilities, kept = lax.top_k(jnp.where(ends, -jnp.inf, best), num_beams)
        tokens = jnp.take_along_axis(candidates, kept[None], axis=-1)
        parent, token = (jnp.take_along_axis(a, kept, axis=-1) for a in (parent, token))
        rows = (parent + num_beams * jnp.arange(batch)[:, None]).reshape(-1)
        carry, logits = step(take_rows(carry, rows), token.reshape(-1))
        return index + 1, carry, logits, tokens, log_probabilities, complete

    tokens = jnp.zeros((max_tokens, batch, num_beams), prompt.dtype)
    tokens = tokens if stop is None else tokens + stop[:, None]
    # All beams start alike: one of them alone is open, the others are impossible.
    dtype = jax.eval_shape(widen, logits).dtype
    impossible = jnp.full((batch, num_beams), -jnp.inf, dtype)
    start = (
        0,
        take_rows(carry, first_of_row),
        logits[first_of_row],
        tokens,
        impossible.at[:, 0].set(0),
        Beams(tokens, jnp.zeros((batch, num_beams), jnp.int32), impossible),
    )
    index, _, _, tokens, log_probabilities, complete = lax.while_loop(unfinished, write_one, start)
    cut_off = jnp.where(index == max_tokens, score(log_probabilities, max_tokens), -jnp.inf)
    lengths = jnp.full((batch, num_beams), max_tokens, jnp.int32)
    return _best(num_beams, complete, Beams(tokens, lengths, cut_off))


def _best(number: int, *beams: Beams) -> Beams:
    """The best of several sets of sequences, best first."""
    both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *beams)
    scores, where = lax.top_k(both.scores, number)
    tokens = jnp.take_along_axis(both.tokens, where[None], axis=-1)
    return Beams(tokens, jnp.take_along_axis(both.lengths, where, axis=-1), scores)


def _keep_likely(logits: jax.Array, top_k: int | None, top_p: float | None) -> jax.Array:
    """The logits, -inf at tokens that are not to be drawn."""
    if top_k is not None and top_k < logits.shape[-1]:
        least = lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None and top_p < 1:
        descending = lax.top_k(logits, logits.shape[-1])[0]
        probabilities = jax.nn.softmax(descending)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        least = jnp.min(descending, axis=-1, where=before < top_p, initial=jnp.inf, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def _read_prompt(
    step: Step, carry: Any, prompt: jax.Array, mask: jax.Array | None, carry_axis: int
) -> tuple[Any, jax.Array]:
    """The carry after each row's prompt, and the logits of the token that follows."""
    carry = jax.tree.map(jnp.asarray, carry)
    _check_step(step, carry, prompt, carry_axis)

    def read_one(loop: Any, inputs: Any) -> Any:
        token, valid = inputs
        carry, logits = step(loop[0], token)
        if valid is not None:
            carry = where_valid(valid, carry, loop[0], carry_axis)
            logits = where_valid(valid, logits, loop[1])
        return (carry, logits), None

    logits = jax.eval_shape(step, carry, prompt[0])[1]
    start = carry, jnp.zeros(logits.shape, logits.dtype)
    return lax.scan(read_one, start, (prompt, mask))[0]


def _take_rows(axis: int, carry: Any, rows: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=axis), carry)


def _check_prompt(prompt: ArrayLike, lengths: ArrayLike | None) -> tuple[jax.Array, Any]:
    prompt = jnp.asarray(prompt)
    if not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise TypeError(f"prompt should hold integers, got dtype: {prompt.dtype}")
    if prompt.ndim != 2 or 0 in prompt.shape:
        raise ValueError(
            "prompt should have shape (length, batch) with at least one token a row, such as a "
            f"start-of-sequence token, got: {prompt.shape}"
        )
    if lengths is None:
        return prompt, None
    mask = lengths_to_mask(lengths, len(prompt))
    if mask.shape != prompt.shape:
        raise ValueError(
            f"prompt_lengths should have shape {prompt.shape[1:]}, got: {mask.shape[1:]}"
        )
    if not isinstance(mask, jax.core.Tracer) and not mask[0].all():
        raise ValueError("prompt_lengths should be at least 1, got a 0")
    return prompt, mask


def _check_step(step: Step, carry: Any, prompt: jax.Array, carry_axis: int) -> None:
    batch = prompt.shape[1]
    for path, leaf in jax.tree.leaves_with_path(carry):
        if leaf.ndim <= carry_axis or leaf.shape[carry_axis] != batch:
            raise ValueError(
                f"carry{jax.tree_util.keystr(path)} should have {batch} rows, as the prompt, on "
                f"axis {carry_axis}, got shape: {leaf.shape}. See carry_axis"
            )
    new_carry, logits = jax.eval_shape(step, carry, prompt[0])
    if logits.ndim != 2 or logits.shape[0] != batch:
        raise ValueError(
            f"step should return logits of shape ({batch}, vocabulary), got: {logits.shape}"
        )
    kinds = [jax.tree.map(lambda a: (a.shape, str(a.dtype)), tree) for tree in (carry, new_carry)]
    if kinds[0] != kinds[1]:
        raise TypeError(
            "step should return a carry of the same structure, shapes and dtypes as it got, "
            f"{kinds[0]}, got: {kinds[1]}"
        )


def _check_stop(stop_token: ArrayLike | None, prompt: jax.Array) -> jax.Array | None:
    if stop_token is None:
        return None
    stop = jnp.asarray(stop_token)
    if not jnp.issubdtype(stop.dtype, jnp.integer):
        raise TypeError(f"stop_token should be an integer, got dtype: {stop.dtype}")
    if stop.shape not in ((), prompt.shape[1:]):
        raise ValueError(f"stop_token should have shape () or {prompt.shape[1:]}, got {stop.shape}")
    return jnp.broadcast_to(stop.astype(prompt.dtype), prompt.shape[1:])


def _at_least(name: str, number: Any, least: int) -> int:
    try:
        number = operator.index(number)
    except TypeError:
        raise TypeError(f"{name} should be an int, got: {number!r}") from None
    if number < least:
        raise ValueError(f"{name} should be at least {least}, got: {number}")
    return number
