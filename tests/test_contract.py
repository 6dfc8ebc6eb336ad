"""Every layer, through every implementation, fulfils the contract."""

from collections.abc import Callable, Iterator
from typing import Any

import cases
import contract
import pytest

import seqjax
from seqjax.ops.dispatch import IMPLEMENTATIONS

NOT_STEPPING = cases.LAYERS.keys() - cases.STEPPING.keys()
COMPOSITIONS = cases.LAYERS.keys() - cases.CELLS.keys()

# These share one compiled program.
EVERYWHERE = [
    contract.check_agrees_with_scan,
    contract.check_padding_never_leaks,
    contract.check_rows_never_leak,
    contract.check_empty_rows_do_nothing,
    contract.check_dtypes_are_kept,
]
DEFAULT = [contract.check_is_the_whole_sequence, contract.check_jit_equals_eager]
NAMED = [
    *EVERYWHERE,
    contract.check_masked_rows_equal_rows_alone,
    contract.check_reverse_equals_flipped,
    contract.check_batch_shapes,
    contract.check_vmap_equals_batch,
    contract.check_transformations_compose,
    contract.check_16_bit_is_close_to_truth,
]
NAMED_WITH_STEP = [*NAMED, contract.check_chunks_equal_whole, contract.check_step_equals_scan]


def checks(name: str, implementation: str | None) -> list[Callable]:
    """What to check, as compiling takes all the time.

    The default is one of the named implementations, which pass everything. A cell without biases
    differs from the one with them by a term of its equation; and a composition only hands an
    implementation on, which one of them shows in full.
    """
    if implementation is None:
        return [] if name.endswith("no_bias") else DEFAULT
    if name.endswith("no_bias") or (implementation == "scan" and name in COMPOSITIONS):
        return EVERYWHERE
    return NAMED_WITH_STEP if name in cases.STEPPING else NAMED


def parameters() -> Iterator[Any]:
    """Checks of one layer stand together."""
    for name, layer in cases.LAYERS.items():
        for implementation in (None, *IMPLEMENTATIONS):
            for check in checks(name, implementation):
                label = f"{name}-{implementation}-{check.__name__}"
                yield pytest.param(check, layer, implementation, id=label)


@pytest.mark.parametrize(("check", "layer", "implementation"), [*parameters()])
def test_layer(check: Callable, layer: seqjax.Layer, implementation: str | None) -> None:
    check(layer, implementation)


@pytest.mark.parametrize("name", sorted(NOT_STEPPING))
def test_layer_without_a_step_says_why(name: str) -> None:
    contract.check_no_step_says_why(cases.LAYERS[name])


@pytest.mark.parametrize("layer", cases.LAYERS.values(), ids=cases.LAYERS)
def test_layer_is_a_value(layer: seqjax.Layer) -> None:
    contract.check_layer_is_a_value(layer)


def test_layers_differ_from_each_other() -> None:
    assert len(set(cases.LAYERS.values())) == len(cases.LAYERS)
