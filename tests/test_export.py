"""Every layer can be written to a file as a program for any platform, and read again and run."""

import functools
from typing import Any

import cases
import chex
import contract
import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
from flax import nnx
from jax import export

import seqjax
import seqjax.linen
import seqjax.nnx
from seqjax.ops.rematerialization import SYMBOLIC_CHUNK

pytest.importorskip("flatbuffers")  # What jax.export writes with.

PLATFORMS = ("cpu", "cuda", "tpu")


def symbolic(layer: seqjax.Layer, time: str) -> tuple[Any, Any]:
    """Shapes of a case and its mask, for any batch size and, where `time` is a name, any length."""
    case = contract.abstract_case(layer, (contract.ROWS,), contract.STEPS, np.float32)
    scope = export.SymbolicScope()

    def shapes(tree: Any, pattern: str) -> Any:
        return jax.tree.map(
            lambda leaf: export.symbolic_args_specs(leaf, pattern, scope=scope), tree
        )

    shaped = contract.Case(
        params=case.params,
        xs=shapes(case.xs, f"{time}, batch, _"),
        carry=shapes(case.carry, "batch, _"),
        cotangents=(
            shapes(case.cotangents[0], "batch, _"),
            shapes(case.cotangents[1], f"{time}, batch, _"),
        ),
    )
    mask = jax.ShapeDtypeStruct(contract.MASK.shape, bool)
    return shaped, shapes(mask, f"{time}, batch")


def through_a_file(function: Any, *shapes: Any, **options: Any) -> export.Exported:
    """Exported for every platform, written and read again."""
    exported = export.export(jax.jit(function), platforms=PLATFORMS)(*shapes)
    again = export.deserialize(exported.serialize(**options))
    assert again.platforms == PLATFORMS
    return again


@pytest.mark.parametrize("name", ["rnn_relu", "lstm_proj", "gru", "bidirectional"])
def test_every_kind(name: str) -> None:
    """For any batch size, with a mask and an initial state: values and gradients.

    The others are made of the same operations.
    """
    layer = cases.LAYERS[name]
    case_shape, mask_shape = symbolic(layer, time="_")

    def run(params: Any, xs: Any, carry: Any, cotangents: Any, mask: Any) -> Any:
        results, pullback = jax.vjp(
            lambda *args: seqjax.scan(layer, *args, mask=mask), params, xs, carry
        )
        return *results, pullback(cotangents)

    exported = through_a_file(run, *case_shape, mask_shape)
    case = contract.make_case(layer)
    expected = contract.evaluate(layer, case, contract.MASK)
    carry, ys, grads = contract.quick_jit(exported.call)(*case, contract.MASK)
    contract.assert_close((carry, ys, grads), (*expected[:2], tuple(expected.grads[:3])))


@pytest.mark.parametrize("name", ["lstm", "stack_bidirectional"])
def test_any_number_of_steps_and_rows(name: str) -> None:
    layer = cases.LAYERS[name]
    case_shape, mask_shape = symbolic(layer, time="time")

    def run(params: Any, xs: Any, carry: Any, mask: Any) -> Any:
        return seqjax.scan(layer, params, xs, carry, mask=mask)

    exported = through_a_file(run, *case_shape[:3], mask_shape)
    for steps, rows in ((6, 6), (3, 2)):
        case = contract.make_case(layer, (rows,), steps)
        mask = contract.MASK[:steps, 1 : rows + 1]
        mask = np.broadcast_to(mask[:, :1], (steps, rows))
        expected = numpy_reference.run(layer, *case[:3], mask)
        got = contract.quick_jit(exported.call)(*case[:3], mask)
        for got_leaf, leaf in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(got_leaf, leaf, atol=1e-5)


def exported_for_any_steps(function: Any, *shapes: tuple[str, Any]) -> Any:
    """Written for symbolic shapes, a number in them standing for itself, and read again."""
    scope = export.SymbolicScope()
    arrays = [
        jax.ShapeDtypeStruct(export.symbolic_shape(shape, scope=scope), dtype)
        for shape, dtype in shapes
    ]
    exported = export.export(jax.jit(function))(*arrays)
    return contract.quick_jit(export.deserialize(exported.serialize()).call)


INPUTS, LENGTHS = ("time, batch, 3", np.float32), ("batch", np.int32)


def in_core(xs: Any, lengths: Any, **options: Any) -> Any:
    layer = cases.LAYERS["lstm_proj"]
    mask = seqjax.lengths_to_mask(lengths, xs.shape[0])
    return seqjax.scan(layer, cases.random_params(layer), xs, mask=mask, **options)


def in_nnx(xs: Any, lengths: Any, **options: Any) -> Any:
    module = seqjax.nnx.LSTM(3, 5, 2, bidirectional=True, rngs=nnx.Rngs(0), **options)
    return module(xs, lengths=lengths)


def in_linen(xs: Any, lengths: Any, **options: Any) -> Any:
    module = seqjax.linen.GRU(3, 5, batch_first=True, **options)
    xs = xs.swapaxes(0, 1)
    return module.init_with_output(jax.random.key(0), xs, lengths=lengths)[0]


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("run", [in_core, in_nnx, in_linen])
def test_lengths_of_any_number_of_steps(run: Any, remat: bool) -> None:
    """What the direct call gives, which knows the number of steps: shorter and longer ones."""
    exported = exported_for_any_steps(functools.partial(run, remat=remat), INPUTS, LENGTHS)
    for steps, lengths in ((5, [5, 0]), (2 * SYMBOLIC_CHUNK + 6, [40, 70, 1])):
        xs = cases.random_inputs((steps, len(lengths), 3))
        got = exported(xs, np.array(lengths, np.int32))
        expected = contract.quick_jit(run)(xs, np.array(lengths))
        chex.assert_trees_all_close(got, expected, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_of_any_number_of_steps(reverse: bool) -> None:
    """With `remat` and without a mask: a chunk, and one that is begun."""
    layer = cases.LAYERS["lstm_proj"]
    params = cases.random_params(layer)

    def gradient(xs: Any, remat: bool = True) -> Any:
        def loss(params: Any, xs: Any) -> Any:
            carry, ys = seqjax.scan(layer, params, xs, reverse=reverse, remat=remat)
            return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves((carry, ys)))

        return jax.value_and_grad(loss, argnums=(0, 1))(params, xs)

    exported = exported_for_any_steps(gradient, INPUTS)
    for steps in (SYMBOLIC_CHUNK, SYMBOLIC_CHUNK + 6):
        xs = cases.random_inputs((steps, 2, 3))
        expected = contract.quick_jit(functools.partial(gradient, remat=False))(xs)
        chex.assert_trees_all_close(exported(xs), expected, rtol=1e-4, atol=1e-4)


def test_masks_and_lengths_of_any_number_of_steps() -> None:
    """Lengths that are known where the number of steps is not; and back from a mask."""

    def run(xs: Any) -> Any:
        mask = seqjax.lengths_to_mask([2, 0, 4], xs.shape[0], batch_first=True)
        return mask, seqjax.mask_to_lengths(mask, batch_first=True)

    exported = exported_for_any_steps(run, INPUTS)
    for steps in (4, 9):
        mask, lengths = exported(np.zeros((steps, 3, 3), np.float32))
        assert mask.tolist() == [[t < n for t in range(steps)] for n in (2, 0, 4)]
        assert lengths.tolist() == [2, 0, 4]
    with pytest.raises(ValueError, match=r"lengths should be between 0 and .* time, got: min -1"):
        exported_for_any_steps(lambda xs: seqjax.lengths_to_mask([-1], xs.shape[0]), INPUTS)


def test_padding_of_any_numbers_of_steps() -> None:
    """Which of them is the longest is known when the program runs."""
    shapes = [(f"{name}, 3", np.float32) for name in ("first", "second")]
    exported = exported_for_any_steps(lambda *rows: seqjax.pad_sequence(rows), *shapes)
    for steps in ((4, 2), (1, 5)):
        rows = [cases.random_inputs((number, 3)) for number in steps]
        np.testing.assert_array_equal(exported(*rows), seqjax.pad_sequence(rows))


def test_what_needs_a_number_says_so() -> None:
    layer = cases.LAYERS["gru"]
    run = functools.partial(seqjax.scan, layer, cases.random_params(layer))
    with pytest.raises(ValueError, match=r"unroll=2 needs a number of steps.*'2\*t', got: time"):
        exported_for_any_steps(functools.partial(run, unroll=2), INPUTS)
    with pytest.raises(ValueError, match="'xla' does not apply: it needs a known number of steps"):
        exported_for_any_steps(functools.partial(run, implementation="xla"), INPUTS)
    xs = cases.random_inputs((6, 2, 3))
    exported = exported_for_any_steps(
        functools.partial(run, unroll=2), ("2*half, batch, 3", np.float32)
    )
    chex.assert_trees_all_close(exported(xs), run(xs), atol=1e-5)


def test_exported_program_has_gradients() -> None:
    """Asked for when writing; the reader then differentiates what was written."""
    layer = cases.LAYERS["gru"]
    case_shape, _ = symbolic(layer, time="_")
    exported = through_a_file(functools.partial(seqjax.scan, layer), *case_shape[:3], vjp_order=1)
    case = contract.make_case(layer)
    expected = contract.evaluate(layer, case)

    @contract.quick_jit
    def gradients(case: contract.Case) -> Any:
        _, pullback = jax.vjp(exported.call, *case[:3])
        return pullback(case.cotangents)

    contract.assert_close(jax.device_get(gradients(case)), tuple(expected.grads[:3]))
