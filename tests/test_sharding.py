"""A batch, or an LSTM's gates, spread over devices give what one device gives.

Devices have to be made before JAX starts, so the test runs this file as a program of its own.
"""

import contextlib
import dataclasses
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
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_recurrence import LeakyMean

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


def explicit_mesh(**axes: int) -> Any:
    """As JAX makes a mesh by default: arrays carry their sharding in their type."""
    return jax.make_mesh(tuple(axes.values()), tuple(axes))


def place(mesh: Any, tree: Any, spec: Any) -> Any:
    return jax.device_put(tree, NamedSharding(mesh, spec))


def place_case(mesh: Any, case: contract.Case) -> contract.Case:
    """Parameters on every device, everything else by its rows."""
    carry, ys = case.cotangents
    return contract.Case(
        place(mesh, case.params, REPLICATED),
        place(mesh, case.xs, TIME_BATCH),
        place(mesh, case.carry, BATCH),
        (place(mesh, carry, BATCH), place(mesh, ys, TIME_BATCH)),
    )


def specs(tree: Any) -> set[Any]:
    """How the arrays are sharded by their types."""
    return {jax.typeof(leaf).sharding.spec for leaf in jax.tree.leaves(tree)}


def entering(mesh: Any, in_context: bool) -> Any:
    """`jax.set_mesh`; or nothing, where arrays alone know the mesh."""
    return jax.set_mesh(mesh) if in_context else contextlib.nullcontext()


def check_explicit_axes(mesh: Any, *, in_context: bool, **options: Any) -> None:
    """Values, gradients and their types; and that the fast implementation is what runs."""
    del mesh
    layer = cases.LAYERS["bidirectional"]
    case = contract.make_case(layer, (ROWS,))
    expected = contract.evaluate(layer, case, MASK, **options)
    mesh = explicit_mesh(data=DEVICES)
    with entering(mesh, in_context):
        case, mask = place_case(mesh, case), place(mesh, MASK, TIME_BATCH)
        evaluate = functools.partial(contract._evaluate, layer)
        got = contract.quick_jit(functools.partial(evaluate, **options))(case, mask)

        def program(name: str | None) -> str:
            traced = jax.make_jaxpr(functools.partial(evaluate, implementation=name))(case, mask)
            return re.sub("0x[0-9a-f]+", "", str(traced))

        assert program(None) == program("xla") != program("scan")
    assert specs((got.ys, got.grads.xs)) == {P(None, "data", None)}
    assert specs((got.carry, got.grads.carry)) == {P("data", None)}
    assert specs(got.grads.params) == {P(None, None), P(None)}
    contract.assert_close(jax.device_get(got), expected)


def check_annotated_nnx(layer: seqjax.Layer, mesh: Any, *, axis_type: AxisType) -> None:
    """An LSTM's gates over two devices, where nothing but its initializers speaks of devices."""
    mesh = two_devices(axis_type)
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


def check_annotated_linen(layer: seqjax.Layer, mesh: Any, *, axis_type: AxisType) -> None:
    mesh = two_devices(axis_type)
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


def two_devices(axis_type: AxisType) -> Any:
    return jax.make_mesh((2,), ("model",), axis_types=(axis_type,), devices=jax.devices()[:2])


GATES = {
    "w_ih": P(None, "model"), "w_hh": P(None, "model"), "b_ih": P("model"), "b_hh": P("model"),
}  # fmt: skip
INITIALIZERS = {
    "kernel_init": jax.nn.initializers.lecun_normal(),
    "recurrent_kernel_init": jax.nn.initializers.orthogonal(),
    "bias_init": seqjax.initializers.forget_bias(),
}


def annotated(with_partitioning: Any) -> dict[str, Any]:
    """The initializers, each with the axes of `GATES`."""
    return {
        name: with_partitioning(init, ("model",) if name == "bias_init" else (None, "model"))
        for name, init in INITIALIZERS.items()
    }


@functools.cache
def value_and_gradients(layer: seqjax.Layer, *, seed: int | None = None, **options: Any) -> Any:
    """Of a loss by parameters and inputs, and the outputs: `(params, xs, mask)`, compiled."""

    def loss(params: Any, xs: Any, mask: Any) -> Any:
        key = None if seed is None else jax.random.key(seed)
        carry, ys = seqjax.scan(layer, params, xs, mask=mask, key=key, **options)
        return sum((leaf**2).sum() for leaf in jax.tree.leaves((carry, ys))), ys

    return contract.quick_jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def check_placed(
    mesh: Any,
    axes: dict[str, int],
    types: str = "EE",
    *,
    layer: seqjax.Layer,
    in_context: bool = True,
    weights: Any = REPLICATED,
    xs: Any = TIME_BATCH,
    mask: Any = REPLICATED,
    **options: Any,
) -> None:
    """Whatever is sharded, and however: what one device gives.

    Args:
      axes: of the mesh, and their sizes.
      types: "E" (explicit) or "A" (automatic), for each axis.
      weights, xs, mask: how they are sharded. Biases are as the weights' columns.
    """
    case = contract.make_case(layer, (ROWS,))
    arguments = case.params, case.xs, MASK
    run = value_and_gradients(layer, **options)
    expected = run(*arguments)
    kinds = {"E": AxisType.Explicit, "A": AxisType.Auto}
    kinds_of_axes = tuple(kinds[name] for name, _ in zip(types, axes, strict=False))
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds_of_axes)
    with entering(mesh, in_context):
        params = jax.tree.map(
            lambda leaf: place(mesh, leaf, P(*tuple(weights)[-leaf.ndim :])), case.params
        )
        got = run(params, place(mesh, case.xs, xs), place(mesh, MASK, mask))
    contract.assert_close(jax.device_get(got), jax.device_get(expected))
    (_, ys), (gradients, _) = got
    assert types == "AE" or "data" in jax.typeof(ys).sharding.spec[1]
    assert jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, gradients) == jax.tree.map(
        lambda leaf: jax.typeof(leaf).sharding.spec, params
    )


def check_replicated_carry(mesh: Any, *, in_context: bool, **options: Any) -> None:
    """A state that is not sharded, with rows that are, one of them padding alone."""
    case = contract.make_case(LSTM, (ROWS,))
    mask = MASK & (np.arange(ROWS) != 1)
    expected = seqjax.scan(LSTM, *case[:3], mask=mask, **options)
    mesh = explicit_mesh(data=DEVICES)
    with entering(mesh, in_context):
        params, carry = place(mesh, (case.params, case.carry), REPLICATED)
        xs, mask = (place(mesh, array, TIME_BATCH) for array in (case.xs, mask))
        got = seqjax.scan(LSTM, params, xs, carry, mask=mask, **options)
    contract.assert_close(jax.device_get(got), jax.device_get(expected))


def check_no_steps(mesh: Any, **options: Any) -> None:
    """A sequence of no steps gives its state back, and no outputs."""
    case = contract.make_case(LSTM, (ROWS,))
    mesh = explicit_mesh(data=DEVICES)
    params, xs = place(mesh, case.params, REPLICATED), place(mesh, case.xs[:0], TIME_BATCH)
    carry = place(mesh, case.carry, BATCH)
    got, ys = seqjax.scan(LSTM, params, xs, carry, **options)
    assert ys.shape == (0, ROWS, LSTM.output_size)
    assert specs(ys) == {P(None, "data", None)}
    contract.assert_close(jax.device_get(got), case.carry)
    zeros, _ = seqjax.scan(LSTM, params, xs, **options)
    jax.tree.map(contract.assert_zero, zeros)


def check_mapped_axis(mesh: Any) -> None:
    """`jax.vmap` over what is sharded, whose axis no array has in its type then."""
    case = contract.make_case(LSTM, (ROWS,))
    xs = np.stack([case.xs, -case.xs])

    @contract.quick_jit
    def gradients(params: Any, xs: Any, mask: Any) -> Any:
        run = jax.vmap(lambda xs: seqjax.scan(LSTM, params, xs, mask=mask)[1])
        return jax.grad(lambda params: (run(xs) ** 2).sum())(params)

    expected = gradients(case.params, xs, MASK)
    mesh = explicit_mesh(several=2, data=2)
    with jax.set_mesh(mesh):
        for spec in (P("several"), P("several", None, "data")):
            got = gradients(jax.device_put(case.params, P()), jax.device_put(xs, spec), MASK)
            contract.assert_close(jax.device_get(got), jax.device_get(expected))


def check_axes_left_by_shard_map(mesh: Any) -> None:
    """Inside of a `jax.shard_map` over one of two explicit axes."""
    case = contract.make_case(LSTM, (ROWS,))
    run = functools.partial(seqjax.scan, LSTM)

    @contract.quick_jit
    def gradients(params: Any, xs: Any) -> Any:
        return jax.grad(lambda params: (run(params, xs)[1] ** 2).sum())(params)

    expected = gradients(*case[:2])
    mesh = explicit_mesh(data=2, model=2)
    run = jax.shard_map(
        run, mesh=mesh, in_specs=(P(), TIME_BATCH), out_specs=(BATCH, TIME_BATCH),
        axis_names={"data"},
    )  # fmt: skip
    with jax.set_mesh(mesh):
        xs = jax.device_put(case.xs, TIME_BATCH)
        got = contract.quick_jit(gradients.__wrapped__)(jax.device_put(case.params, P()), xs)
    contract.assert_close(jax.device_get(got), jax.device_get(expected))


def check_no_collective_on_explicit_axes(
    mesh: Any, *, implementation: str, in_context: bool
) -> None:
    """As `jax.shard_map` would have it: one sum of the gradients, and no row leaves its device."""
    case = contract.make_case(LSTM, (ROWS,))
    mesh = explicit_mesh(data=DEVICES)
    with entering(mesh, in_context):
        case, mask = place_case(mesh, case), place(mesh, MASK, TIME_BATCH)
        run = value_and_gradients(LSTM, implementation=implementation)
        program = run.lower(case.params, case.xs, mask).compile().as_text()
    everywhere, in_loops = collectives(program)
    assert everywhere, "no sum of gradients was found at all"
    assert not in_loops, in_loops
    moved = re.findall(r" (all-gather|all-to-all|collective-permute|reduce-scatter)", program)
    assert not moved, moved


def check_decoding(
    mesh: Any, *, in_context: bool, outside_jit: bool = False, **options: Any
) -> None:
    """Rows sharded in the prompt, the carry or both."""
    layer = seqjax.Stack([seqjax.GRUCell(5, 4), seqjax.LSTMCell(4, 5)])
    params = jax.tree.map(lambda leaf: 3 * leaf, cases.random_params(layer))
    carry = contract.make_case(layer, (ROWS,)).carry
    prompt = np.arange(3 * ROWS).reshape(3, ROWS) % 5
    lengths = np.arange(ROWS) % 3 + 1
    decode = seqjax.beam_search if "num_beams" in options else seqjax.generate

    @contract.quick_jit
    def write(params: Any, carry: Any, prompt: Any, lengths: Any) -> Any:
        def step(carry: Any, token: jax.Array) -> Any:
            return layer.step(params, carry, jax.nn.one_hot(token, 5))

        return decode(step, carry, prompt, max_tokens=5, prompt_lengths=lengths, **options)

    expected = jax.device_get(write(params, carry, prompt, lengths))
    mesh = explicit_mesh(data=DEVICES)
    with entering(mesh, in_context):
        params = place(mesh, params, REPLICATED)
        if outside_jit:
            write = write.__wrapped__
        for of_carry, of_prompt in ((BATCH, REPLICATED), (REPLICATED, TIME_BATCH)):
            rows = place(mesh, carry, of_carry), place(mesh, prompt, of_prompt)
            got = write(params, *rows, place(mesh, lengths, BATCH))
            assert "data" in jax.typeof(got.tokens).sharding.spec
            contract.assert_close(jax.device_get(got), expected)


def check_bad_step(mesh: Any) -> None:
    """On a mesh, too, it is this library that says what is wrong with a step."""
    mesh = explicit_mesh(data=DEVICES)
    carry = place(mesh, np.zeros((ROWS, 4)), BATCH)
    prompt = place(mesh, np.ones((3, ROWS), int), TIME_BATCH)
    logits = np.zeros((ROWS, 5))
    for step, message in (
        (lambda carry, token: ((carry, carry), logits), "a carry of the same structure"),
        (lambda carry, token: (carry, logits[0, 0]), "logits of shape"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            seqjax.generate(step, carry, prompt, max_tokens=3, temperature=0.0)


@dataclasses.dataclass(frozen=True)
class Doubled(seqjax.Layer):
    """A layer of one's own: another one, of inputs twice as large."""

    inner: seqjax.Layer
    input_size: int = cases.INPUT_SIZE

    @property
    def output_size(self) -> int:
        return self.inner.output_size

    def init(self, key: jax.Array, dtype: Any = np.float32) -> Any:
        return self.inner.init(key, dtype)

    def initial_carry(self, batch_shape: tuple[int, ...] = (), dtype: Any = np.float32) -> Any:
        return self.inner.initial_carry(batch_shape, dtype)

    def step(self, params: Any, carry: Any, x: jax.Array) -> Any:
        return self.inner.step(params, carry, 2 * x)

    def run(self, params: Any, carry: Any, xs: jax.Array, **options: Any) -> Any:
        return self.inner.run(params, carry, 2 * xs, **options)


def where(in_context: bool) -> str:
    return "in a context" if in_context else "arrays alone"


KEY = jax.random.key(0)
LSTM = cases.LAYERS["lstm"]
DROPOUT = seqjax.Stack([seqjax.RNNCell(cases.INPUT_SIZE, 4), seqjax.GRUCell(4, 4)], dropout=0.3)
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
    **{
        f"annotations in {name}, {axis_type}": functools.partial(check, LSTM, axis_type=axis_type)
        for name, check in (("NNX", check_annotated_nnx), ("Linen", check_annotated_linen))
        for axis_type in (AxisType.Auto, AxisType.Explicit)
    },
    "plain jit": functools.partial(check_plain_jit, LSTM),
    **{
        f"explicit axes, {name}, {where(in_context)}": functools.partial(
            check_explicit_axes, implementation=name, in_context=in_context
        )
        for name, in_context in [("xla", False), ("xla", True), ("scan", False)]
    },
    **{
        f"{name}, {where(in_context)}": functools.partial(
            check_placed, axes={"data": DEVICES}, in_context=in_context, **options
        )
        for name, in_context, options in (
            ("remat", True, {"layer": LSTM, "remat": True}),
            ("dropout", True, {"layer": DROPOUT, "seed": 0}),
            ("dropout", False, {"layer": DROPOUT, "seed": 0}),
            ("only the mask sharded", False, {"layer": LSTM, "xs": REPLICATED, "mask": TIME_BATCH}),
            ("a layer of one's own", False, {"layer": Doubled(LSTM)}),
            ("a cell of one's own", True, {"layer": LeakyMean(cases.INPUT_SIZE)}),
        )
    },
    **{
        f"replicated carry, {place}": functools.partial(
            check_replicated_carry, in_context=place == "in context"
        )
        for place in ("in context", "arrays alone")
    },
    **{
        f"mesh of {name}": functools.partial(
            check_placed, axes={"data": 2, "model": 2}, layer=LSTM, **options
        )
        for name, options in {
            "explicit and automatic axes": {"types": "EA"},
            "automatic and explicit axes": {"types": "AE"},
            "an axis that holds nothing": {},
            "weights over hidden units": {"weights": P(None, "model")},
            "rows over both": {"xs": P(None, ("data", "model"))},
            "steps over one of them": {"xs": P("model", "data")},
        }.items()
    },
    "no steps, scan": functools.partial(check_no_steps, implementation="scan"),
    "no steps, xla": functools.partial(check_no_steps, implementation="xla"),
    "no steps, remat": functools.partial(check_no_steps, remat=True),
    "decoding with a bad step": check_bad_step,
    "vmap over a sharded axis": check_mapped_axis,
    "axes that shard_map leaves": check_axes_left_by_shard_map,
    **{
        f"no row leaves its device, {name}": functools.partial(
            check_no_collective_on_explicit_axes, implementation=name, in_context=in_context
        )
        for name, in_context in zip(IMPLEMENTATIONS, (True, False), strict=True)
    },
    **{
        f"decoding, {name}": functools.partial(check_decoding, **options)
        for name, options in {
            "sampled": {"key": KEY, "top_k": 3, "stop_token": 2, "in_context": True},
            "greedy": {"temperature": 0.0, "in_context": False, "outside_jit": True},
            "beams": {"num_beams": 2, "stop_token": 1, "in_context": False},
        }.items()
    },
}


def main() -> None:
    """Runs every check and prints, as JSON, what went wrong by name of the check."""
    import conftest  # pytest has imported it already, a program has not.

    conftest.collect_garbage_rarely()
    if len(jax.devices()) != DEVICES:
        sys.exit(f"expected {DEVICES} devices, got {jax.devices()}")
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    problems = {}
    for name, check in CHECKS.items():
        try:
            check(mesh=mesh)
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
