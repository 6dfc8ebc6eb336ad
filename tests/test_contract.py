"""Every layer, through every implementation, fulfils the contract."""

from collections.abc import Callable, Iterator
from typing import Any

import cases
import contract
import pytest

import seqjax
from seqjax.ops.dispatch import IMPLEMENTATIONS

NOT_STEPPING = cases.LAYERS.keys() - cases.STEPPING.keys()

# These share one compiled program.
EVERYWHERE = [
    contract.check_agrees_with_scan,
    contract.check_padding_never_leaks,
    contract.check_rows_never_leak,
    contract.check_empty_rows_do_nothing,
]
# These compile one or two programs each.
IN_FULL = [
    contract.check_masked_rows_equal_rows_alone,
    contract.check_reverse_equals_flipped,
    contract.check_batch_shapes,
    contract.check_vmap_equals_batch,
    contract.check_transformations_compose,
]
WITH_STEP = [contract.check_chunks_equal_whole, contract.check_step_equals_scan]
QUICK = [contract.check_padding_never_leaks, contract.check_reverse_equals_flipped]


def checks(name: str, implementation: str | None) -> list[Callable]:
    """What to check, as compiling takes all the time.

    Every layer is compared with the plain scan, and has to keep padding, rows and dtypes. Beyond
    that:

    - The default is "xla", to the letter, so its own are eager calls and jit: `scan`'s, which does
      not look into a layer.
    - The plain scan treats every cell alike: the one with the largest state and parameters shows
      it. The cells' own axes and equations are in `test_cells.py`.
    - Two cells have between them all that "xla" makes a difference of: a c, a projection, products
      that only add up and products that do not. The others differ by terms of their equation,
      whose values and gradients, in both directions and with padding, are in `test_golden.py`.
    - A composition only hands an implementation on: one of two cells and directions shows it, and
      the stack, which alone of them steps, shows its step.
    """
    in_full = name == "lstm_proj" or (implementation == "xla" and name == "gru")
    composed = implementation == "xla" and name == "bidirectional"
    if implementation is None:
        whole = [] if name.endswith("no_bias") else [contract.check_is_the_whole_sequence]
        return whole + [contract.check_jit_equals_eager] * (in_full or name == "bidirectional")
    chosen = list(EVERYWHERE)
    if name in cases.CELLS and not name.endswith("no_bias"):
        chosen += [contract.check_dtypes_are_kept, contract.check_16_bit_is_close_to_truth]
    else:
        chosen.append(contract.check_two_dtypes_are_kept)
    if in_full or composed:
        chosen += IN_FULL
    if composed:
        chosen.append(contract.check_16_bit_is_close_to_truth)
    if in_full or (implementation == "xla" and name == "stack"):
        chosen += WITH_STEP
    return chosen


def parameters() -> Iterator[Any]:
    """Checks of one layer stand together."""
    for name, layer in cases.LAYERS.items():
        for implementation in (None, *IMPLEMENTATIONS):
            for check in checks(name, implementation):
                label = f"{name}-{implementation}-{check.__name__}"
                quick = check in QUICK and name in ("lstm_proj", "gru") and implementation == "xla"
                marks = [pytest.mark.quick] if quick else []
                yield pytest.param(check, layer, implementation, id=label, marks=marks)


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
