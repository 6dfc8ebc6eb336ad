"""Drawing tokens: temperature, `top_k` and `top_p`."""

import jax
import jax.numpy as jnp
from jax import lax


def draw(
    key: jax.Array,
    logits: jax.Array,
    temperature: jax.Array,
    top_k: int | None,
    top_p: jax.Array | None,
) -> jax.Array:
    """A token for each row, the likeliest one where the temperature is 0.

    Args:
      key: the random key.
      logits: `(batch, vocabulary)`.
      temperature: `(batch, 1)` or `(1, 1)`, of the logits' dtype.
      top_k: tokens to draw from, or None for all.
      top_p: their probability, like `temperature`, or None for 1.
    """
    draws = temperature > 0
    temperature = jnp.where(draws, temperature, 1)
    # Cut before they are divided, as a high temperature makes them equal.
    kept = _keep_most(logits, top_k) if top_k is not None else logits
    if top_p is not None:
        kept = _keep_share(kept, temperature, top_p)
    drawn = jax.random.categorical(key, _temper(kept, temperature))
    return jnp.where(draws[:, 0], drawn, jnp.argmax(logits, axis=-1))


def _keep_most(logits: jax.Array, number: int) -> jax.Array:
    """The logits, -inf where `number` others are likelier."""
    least = lax.top_k(logits, min(number, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits < least, -jnp.inf, logits)


def _keep_share(logits: jax.Array, temperature: jax.Array, share: jax.Array) -> jax.Array:
    """The logits, -inf where likelier ones hold the share; of no share, the likeliest is kept."""
    descending = lax.top_k(logits, logits.shape[-1])[0]
    probabilities = jax.nn.softmax(_temper(descending, temperature))
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < share) | (before == 0) | (share >= 1)  # The sum is 1 but for rounding.
    least = jnp.min(descending, axis=-1, where=kept, initial=jnp.inf, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)


def _temper(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """`logits / temperature` but for a constant; what is -inf stays so at any temperature."""
    below_best = logits - logits.max(axis=-1, keepdims=True)  # 0 over a small temperature is 0.
    return jnp.where(jnp.isneginf(below_best), -jnp.inf, below_best / temperature)
