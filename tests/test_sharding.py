"""A batch, or an LSTM's gates, spread over devices give what one device gives.

Devices have to be made before JAX starts, so the test runs this file as a program of its own.
"""

import functools
import json
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import cases
import contract
import jax
import numpy as np
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import seqjax
import seqjax.linen
import seqjax.nnx
from seqjax.ops.dispatch import IMPLEMENTATIONS

DEVICES = 4
ROWS = 2 * DEVICES
MASK = np.concatenate([contract.MASK, contract.MASK[:, : ROWS - contract.ROWS]], axis=1)

BATCH, TIME_BATCH, REPLICATED = P("data"), P(None, "data"), P()


def shard_map(function: Any, mesh: Any, in_specs: Any, out_specs: Any) -> Any:
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def check_values_and_gradients(layer: seqjax.Layer, mesh: Any, *, reverse: bool = False) -> None:
    """Inputs, mask and state sharded over rows; parameters on every device."""
    case = contract.make_case(layer, (ROWS,))
    run = functools.partial(seqjax.scan, layer, reverse=reverse)
    sharded = shard_map(
        lambda params, xs, carry, mask: run(params, xs, carry, mask=mask),
        mesh,
        (REPLICATED, TIME_BATCH, BATCH, TIME_BATCH),
        (BATCH, TIME_BATCH),
    )

    @contract.quick_jit
    def evaluate(case: contract.Case) -> contract.Evaluation:
        (carry, ys), pullback = jax.vjp(lambda *args: sharded(*args, MASK), *case[:3])
        return contract.Evaluation(carry, ys, contract.Case(*pullback(case.cotangents), None))

    got = evaluate(case)
    assert got.ys.sharding.is_equivalent_to(NamedSharding(mesh, TIME_BATCH), 3)
    contract.assert_close(
        jax.device_get(got), contract.evaluate(layer, case, MASK, reverse=reverse)
    )


def check_without_mask_and_state(layer: seqjax.Layer, mesh: Any) -> None:
    """The zero state is made inside, where it does not vary over devices but the inputs do."""
    case = contract.make_case(layer, (ROWS,))
    run = functools.partial(seqjax.scan, layer)
    sharded = shard_map(run, mesh, (REPLICATED, TIME_BATCH), (BATCH, TIME_BATCH))
    expected = contract.quick_jit(run)(*case[:2])
    contract.assert_close(contract.quick_jit(sharded)(*case[:2]), expected)


def check_only_the_mask_is_sharded(layer: seqjax.Layer, mesh: Any) -> None:
    """One row of inputs and one state for everyone, as where only lengths differ."""
    case = contract.make_case(layer, (1,))
    mask = np.arange(contract.STEPS)[:, None] < np.arange(1, DEVICES + 1)
    sharded = shard_map(
        lambda params, xs, carry, mask: seqjax.scan(layer, params, xs, carry, mask=mask),
        mesh,
        (REPLICATED, REPLICATED, REPLICATED, TIME_BATCH),
        (BATCH, TIME_BATCH),
    )
    got = contract.quick_jit(sharded)(*case[:3], mask)
    xs = np.repeat(case.xs, DEVICES, axis=1)
    carry = jax.tree.map(lambda leaf: np.repeat(leaf, DEVICES, axis=0), case.carry)
    run = contract.quick_jit(functools.partial(seqjax.scan, layer))
    contract.assert_close(got, run(case.params, xs, carry, mask=mask))


def check_training_step(layer: seqjax.Layer, mesh: Any) -> None:
    """Gradients taken inside, on each device's rows, are summed over devices."""
    case = contract.make_case(layer, (ROWS,))

    def gradients(params: Any, xs: Any) -> Any:
        return jax.grad(lambda params: (seqjax.scan(layer, params, xs)[1] ** 2).sum())(params)

    sharded = shard_map(gradients, mesh, (REPLICATED, TIME_BATCH), REPLICATED)
    expected = contract.quick_jit(gradients)(*case[:2])
    contract.assert_close(contract.quick_jit(sharded)(*case[:2]), expected)


def check_no_collective_in_a_loop(
    layer: seqjax.Layer, mesh: Any, *, implementation: str, order: int = 1
) -> None:
    """Devices meet once a training step, to sum the gradients, and not at every time step."""
    case = contract.make_case(layer, (ROWS,))

    def gradients(params: Any, xs: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            return (seqjax.scan(layer, params, xs, implementation=implementation)[1] ** 2).sum()

        def slope(params: Any) -> jax.Array:
            return sum((leaf**2).sum() for leaf in jax.tree.leaves(jax.grad(loss)(params)))

        return jax.grad(loss if order == 1 else slope)(params)

    sharded = jax.jit(shard_map(gradients, mesh, (REPLICATED, TIME_BATCH), REPLICATED))
    program = sharded.lower(*case[:2]).compile().as_text()
    everywhere, in_loops = collectives(program)
    assert everywhere, "no sum of gradients was found at all"
    assert not in_loops, in_loops


def collectives(program: str) -> tuple[list[str], list[str]]:
    """Computations of an HLO program with collectives in them: all, and those that a loop runs."""
    found = re.findall(
        r"^(?:ENTRY )?%?([\w.-]+) \(.*?\{\n(.*?)^\}", program, re.MULTILINE | re.DOTALL
    )
    computations = dict(found)
    calls = {
        name: set(re.findall(r"%([\w.-]+)", text)) & computations.keys()
        for name, text in computations.items()
    }
    in_loops: set[str] = set()
    new = set(re.findall(r"body=%?([\w.-]+)", program))
    assert new, "the program has no loop"
    while new:
        in_loops |= new
        new = set().union(*(calls[name] for name in new)) - in_loops
    everywhere = [name for name, text in found if re.search(r" (all-|reduce-scatter|coll)", text)]
    return everywhere, [name for name in everywhere if name in in_loops]


def check_plain_jit(layer: seqjax.Layer, mesh: Any) -> None:
    """Without `shard_map`: jit of sharded arrays keeps them sharded."""
    case = contract.make_case(layer, (ROWS,))
    run = functools.partial(seqjax.scan, layer)
    expected = contract.quick_jit(run)(*case[:3], mask=MASK)
    put = functools.partial(jax.device_put, device=NamedSharding(mesh, TIME_BATCH))
    rows = functools.partial(jax.device_put, device=NamedSharding(mesh, BATCH))
    params = jax.device_put(case.params, NamedSharding(mesh, REPLICATED))
    carry, ys = contract.quick_jit(run)(
        params, put(case.xs), jax.tree.map(rows, case.carry), mask=put(MASK)
    )
    assert ys.sharding.is_equivalent_to(NamedSharding(mesh, TIME_BATCH), 3), ys.sharding
    contract.assert_close((carry, ys), expected)


def check_explicit_mesh(layer: seqjax.Layer, mesh: Any) -> None:
    """Where arrays carry their sharding in their type, which is how JAX makes a mesh by default."""
    case = contract.make_case(layer, (ROWS,))
    run = functools.partial(seqjax.scan, layer)
    expected = contract.quick_jit(run)(*case[:2], mask=MASK)
    explicit = jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(explicit):
        params = jax.device_put(case.params, REPLICATED)
        xs, mask = jax.device_put((case.xs, MASK), TIME_BATCH)
        carry, ys = contract.quick_jit(run)(params, xs, mask=mask)
        assert jax.typeof(ys).sharding.spec == P(None, "data", None)
    contract.assert_close(jax.device_get((carry, ys)), jax.device_get(expected))


def check_annotated_nnx(layer: seqjax.Layer, mesh: Any) -> None:
    """An LSTM's gates over devices, where nothing but its initializers speaks of devices."""
    xs = cases.random_inputs((3, 2, layer.input_size))

    def make(**options: Any) -> seqjax.nnx.Recurrent:
        return seqjax.nnx.Recurrent(layer, rngs=nnx.Rngs(0), **options)

    run = nnx.jit(lambda module, xs: module(xs))
    expected = run(make(**INITIALIZERS), xs)
    with jax.set_mesh(mesh):
        module = make(**annotated(nnx.with_partitioning))
        got = run(module, xs)
    for name, spec in GATES.items():
        array = getattr(module, name)[...]
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, spec), array.ndim), name
    contract.assert_close(jax.device_get(got), jax.device_get(expected))


def check_annotated_linen(layer: seqjax.Layer, mesh: Any) -> None:
    xs = cases.random_inputs((3, 2, layer.input_size))
    key = jax.random.key(0)
    plain = seqjax.linen.Recurrent(layer, **INITIALIZERS)
    expected = plain.apply(plain.init(key, xs), xs)
    module = seqjax.linen.Recurrent(layer, **annotated(nn.with_partitioning))
    shardings = nn.get_sharding(jax.eval_shape(module.init, key, xs), mesh)
    variables = jax.jit(module.init, out_shardings=shardings)(key, xs)
    for name, spec in GATES.items():
        array = variables["params"][name].value
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, spec), array.ndim), name
    got = jax.jit(module.apply)(variables, xs)
    contract.assert_close(jax.device_get(got), jax.device_get(expected))


GATES = {"w_ih": P(None, "data"), "w_hh": P(None, "data"), "b_ih": P("data"), "b_hh": P("data")}
INITIALIZERS = {
    "kernel_init": jax.nn.initializers.lecun_normal(),
    "recurrent_kernel_init": jax.nn.initializers.orthogonal(),
    "bias_init": seqjax.initializers.forget_bias(),
}


def annotated(with_partitioning: Any) -> dict[str, Any]:
    """The initializers, each with the axes of `GATES`."""
    return {
        name: with_partitioning(init, ("data",) if name == "bias_init" else (None, "data"))
        for name, init in INITIALIZERS.items()
    }


LSTM = cases.LAYERS["lstm"]
BIDIRECTIONAL = cases.LAYERS["stack_bidirectional"]
CHECKS = {
    **{
        f"shard_map of {name}": functools.partial(check_values_and_gradients, layer)
        for name, layer in cases.LAYERS.items()
        if name in ("gru", "stack", "stack_bidirectional")
    },
    "shard_map in reverse": functools.partial(check_values_and_gradients, LSTM, reverse=True),
    "no mask, no state": functools.partial(check_without_mask_and_state, BIDIRECTIONAL),
    "only the mask sharded": functools.partial(check_only_the_mask_is_sharded, LSTM),
    "training step": functools.partial(check_training_step, LSTM),
    **{
        f"no collective in a loop of {name}": functools.partial(
            check_no_collective_in_a_loop, BIDIRECTIONAL, implementation=name
        )
        for name in IMPLEMENTATIONS
    },
    "no collective in a loop of second derivatives": functools.partial(
        check_no_collective_in_a_loop, LSTM, implementation="xla", order=2
    ),
    "annotations in NNX": functools.partial(check_annotated_nnx, LSTM),
    "annotations in Linen": functools.partial(check_annotated_linen, LSTM),
    "plain jit": functools.partial(check_plain_jit, LSTM),
    "explicit mesh": functools.partial(check_explicit_mesh, BIDIRECTIONAL),
}


def main() -> None:
    """Runs every check and prints, as JSON, what went wrong by name of the check."""
    import conftest  # pytest has imported it already, a program has not.

    conftest.collect_garbage_rarely()
    if len(jax.devices()) != DEVICES:
        sys.exit(f"expected {DEVICES} devices, got {jax.devices()}")
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    gates = jax.make_mesh((2,), ("data",), axis_types=mesh.axis_types, devices=jax.devices()[:2])
    problems = {}
    for name, check in CHECKS.items():
        try:
            check(mesh=gates if name.startswith("annotations") else mesh)
        except Exception:  # The test reports it; the other checks still run.
            problems[name] = traceback.format_exc()
    print(json.dumps(problems))


def test_sharded_equals_single_device() -> None:
    flags = os.environ.get("XLA_FLAGS", "")
    environment = os.environ | {
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={DEVICES}",
        "JAX_PLATFORMS": "cpu",
    }
    program = subprocess.run(
        [sys.executable, "-W", "error", Path(__file__)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert program.returncode == 0, program.stdout + program.stderr
    problems = json.loads(program.stdout)
    assert not problems, "\n".join(f"{name}:\n{text}" for name, text in problems.items())


if __name__ == "__main__":
    main()
