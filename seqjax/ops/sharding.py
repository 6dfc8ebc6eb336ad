"""Meshes: each device runs its own rows, and a loop's state enters with the type it leaves with."""

import functools
import operator
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import (
    AbstractMesh,
    AxisType,
    NamedSharding,
    PartitionSpec,
    explicit_axes,
    get_abstract_mesh,
    use_abstract_mesh,
)

# JAX gives them no types.
P: Callable[..., PartitionSpec] = PartitionSpec
reshard: Callable[..., Any] = jax.sharding.reshard

Decode = TypeVar("Decode", bound=Callable[..., Any])


def run_own_rows(
    run: Callable[..., tuple[Any, jax.Array]],
    params: Any,
    carry: Any,
    xs: jax.Array,
    mask: jax.Array | None,
) -> tuple[Any, jax.Array]:
    """`run(params, carry, xs, mask=mask)`, where each device of a mesh runs its own rows.

    So it is over explicit axes, those that arrays have in their types. Rows are sharded as those of
    `xs` or, if they are not, of the mask or the carry. What else is sharded, such as weights, is
    gathered before, and its gradient is scattered after: no device waits within the loop.
    """
    mesh = explicit_mesh((params, carry, xs, mask))
    if mesh is None:
        return run(params, carry, xs, mask=mask)
    batch = xs.ndim - 2
    specs = [_spec(leaf)[1 : batch + 1] for leaf in jax.tree.leaves((xs, mask))]
    specs += [_spec(leaf)[:batch] for leaf in jax.tree.leaves(carry)]
    rows = next((spec for spec in specs if any(spec)), ())
    in_specs = P(), P(*rows), P(None, *rows), P(None, *rows)
    axes = {
        axis
        for leaf in jax.tree.leaves((params, carry, xs, mask))
        for names in _spec(leaf)
        for axis in (names if isinstance(names, tuple) else (names,))
        if axis is not None
    }
    if not axes:  # Arrays made on the way get the mesh that the others have in their types.
        with use_abstract_mesh(mesh):
            return run(params, carry, xs, mask=mask)

    def run_shard(params: Any, carry: Any, xs: Any, mask: Any) -> tuple[Any, jax.Array]:
        return run(params, carry, xs, mask=mask)

    sharded = jax.shard_map(
        run_shard, mesh=mesh, in_specs=in_specs, out_specs=in_specs[1:3], axis_names=axes
    )
    arguments = zip((params, carry, xs, mask), in_specs, strict=True)
    return sharded(*(reshard(tree, NamedSharding(mesh, spec)) for tree, spec in arguments))


def explicit_mesh(tree: Any) -> AbstractMesh | None:
    """The mesh with explicit axes that the arrays are on, or the context's; None: there is none."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    meshes = [jax.typeof(array).sharding.mesh for array in arrays]
    meshes.append(get_abstract_mesh())
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)


def shard_like(array: jax.Array, like: jax.Array) -> jax.Array:
    """`array`, sharded over explicit axes as `like` is, to whose shape it broadcasts."""
    sharding = jax.typeof(like).sharding
    if not sharding.mesh.explicit_axes:
        return array
    return reshard(jnp.broadcast_to(array, like.shape), sharding)


def vary_like(tree: Any, like: Any) -> Any:
    """`tree`, varying over every manual mesh axis over which anything in `like` varies.

    Zeros, or a replicated state, that meet inputs sharded by `jax.shard_map` would otherwise enter
    a loop as invariant and leave it as varying; or, by `jax.vmap` over an explicit axis, enter it
    as replicated and leave it sharded. Nothing changes elsewhere.
    """
    mesh = get_abstract_mesh()
    if not (mesh.manual_axes or mesh.explicit_axes):
        return tree
    # A select between twice the same value takes on its predicate's axes; XLA removes it.
    predicates = [jnp.any(leaf == leaf) for leaf in jax.tree.leaves(like)]
    predicate = functools.reduce(operator.or_, predicates)
    return jax.tree.map(lambda leaf: lax.select(predicate, leaf, leaf), tree)


def around_steps(**row_axes: int) -> Callable[[Decode], Decode]:
    """Lets `decode(step, carry, prompt, **options)` take rows that are sharded over explicit axes.

    `step` is the user's and sees the types that it would see without. Around it explicit axes are
    automatic: XLA shards what is there, and the results get back the types of the step's own.

    Args:
      row_axes: by the names of the results, except "carry", which of their axes is the rows'.
    """

    def decorate(decode: Any) -> Any:
        @functools.wraps(decode)
        def run(step: Any, carry: Any, prompt: Any, **options: Any) -> Any:
            mesh = explicit_mesh((carry, prompt))
            if mesh is None:
                return decode(step, carry, prompt, **options)
            arrays = {
                name: value for name, value in options.items() if isinstance(value, jax.Array)
            }

            @jax.jit  # Outside of it, no axis can be made automatic.
            def run_on_mesh(carry: Any, prompt: Any, arrays: Any) -> Any:
                run = functools.partial(decode, **options)
                return _run_around(run, step, carry, prompt, arrays, row_axes, mesh)

            return run_on_mesh(carry, prompt, arrays)

        return run

    return decorate


def _run_around(
    decode: Any,
    step: Any,
    carry: Any,
    prompt: Any,
    arrays: Any,
    row_axes: dict[str, int],
    mesh: AbstractMesh,
) -> Any:
    axes = mesh.explicit_axes
    automatic = mesh.update_axis_types(dict.fromkeys(axes, AxisType.Auto))

    @functools.cache  # Found at the first step, when `decode` has checked its arguments.
    def specs() -> tuple[Any, Any]:
        with use_abstract_mesh(mesh):
            new_carry, logits = jax.eval_shape(lambda: step(carry, prompt[0]))
        # What should not be so is refused by `decode`, which calls the step that needs these.
        shapes = [jax.tree.map(jnp.shape, tree) for tree in (carry, new_carry)]
        like = new_carry if shapes[0] == shapes[1] else carry
        return jax.tree.map(_spec, like), next(iter(_spec(logits)), None)

    def typed_step(carry: Any, token: jax.Array) -> Any:
        carry_specs, rows = specs()
        run = explicit_axes(step, axes=axes, in_sharding=(carry_specs, P(rows)))
        return run(carry, token)

    with use_abstract_mesh(automatic):
        inputs = reshard((carry, prompt, arrays), NamedSharding(automatic, P()))
        result = decode(typed_step, *inputs[:2], **inputs[2])
    carry_specs, rows = specs()
    result_specs = {name: P(*[None] * axis, rows) for name, axis in row_axes.items()}
    with use_abstract_mesh(mesh):
        return type(result)(
            **{
                name: reshard(value, (result_specs | {"carry": carry_specs})[name])
                for name, value in result._asdict().items()
            }
        )


def _spec(array: jax.Array) -> PartitionSpec:
    return jax.typeof(array).sharding.spec
