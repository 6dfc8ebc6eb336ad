"""What `jax.shard_map` asks of a loop: that its state enters with the type that it leaves with."""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def vary_like(tree: Any, like: Any) -> Any:
    """`tree`, varying over every manual mesh axis over which anything in `like` varies.

    Zeros, or a replicated state, that meet inputs sharded by `jax.shard_map` would otherwise enter
    a loop as invariant and leave it as varying. Nothing changes outside of `jax.shard_map`.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return tree
    # A select between twice the same value takes on its predicate's axes; XLA removes it.
    predicates = [jnp.any(leaf == leaf) for leaf in jax.tree.leaves(like)]
    predicate = functools.reduce(operator.or_, predicates)
    return jax.tree.map(lambda leaf: lax.select(predicate, leaf, leaf), tree)
