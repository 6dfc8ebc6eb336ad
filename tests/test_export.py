"""Every layer can be written to a file as a program for any platform, and read again and run."""

import functools
from typing import Any

import cases
import contract
import jax
import numpy as np
import numpy_reference
import pytest
from jax import export

import seqjax

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
