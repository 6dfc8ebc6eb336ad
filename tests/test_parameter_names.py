"""Names of parameters: one for each, the same in both shells, and back again."""

from typing import Any

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shells import SHELLS, build

import seqjax
from seqjax.parameter_names import params_from_dict, params_to_dict


def paths(tree: Any, prefix: str = "") -> list[str]:
    """`a/b/c` for every leaf of nested dicts."""
    found = []
    for name, value in tree.items():
        found += paths(value, f"{prefix}{name}/") if isinstance(value, dict) else [prefix + name]
    return found


@pytest.mark.parametrize("layer", cases.LAYERS.values(), ids=cases.LAYERS)
def test_round_trip(layer: seqjax.Layer) -> None:
    params = cases.random_params(layer)
    tree = params_to_dict(params)
    assert len(paths(tree)) == len(jax.tree.leaves(params))  # No name is used twice.
    chex.assert_trees_all_equal(params_from_dict(layer, tree), params, strict=True)


def test_names_of_a_cell() -> None:
    params = cases.random_params(cases.LAYERS["lstm_proj"])
    tree = params_to_dict(params)
    assert list(tree) == ["w_ih", "w_hh", "b_ih", "b_hh", "w_hr"]
    for name, value in tree.items():
        assert value is getattr(params, name)


def test_names_without_bias() -> None:
    assert list(params_to_dict(cases.random_params(cases.LAYERS["gru_no_bias"]))) == [
        "w_ih", "w_hh",
    ]  # fmt: skip


def test_names_of_two_bidirectional_layers() -> None:
    params = cases.random_params(cases.LAYERS["stack_bidirectional"])
    tree = params_to_dict(params)
    assert paths(tree) == [
        f"layers_{index}/{direction}/{name}"
        for index, names in enumerate(["w_ih w_hh b_ih b_hh w_hr", "w_ih w_hh b_ih b_hh"])
        for direction in ("forward", "backward")
        for name in names.split()
    ]
    assert tree["layers_1"]["backward"]["b_hh"] is params[1].backward.b_hh


def test_names_of_more_than_ten_layers() -> None:
    """By number, not by alphabet."""
    stack = seqjax.Stack([seqjax.RNNCell(2, 2)] * 12)
    params = tuple(
        jax.tree.map(lambda leaf, index=index: jnp.full_like(leaf, index), layer)
        for index, layer in enumerate(cases.random_params(stack))
    )
    tree = params_to_dict(params)
    assert list(tree) == [f"layers_{index}" for index in range(12)]
    shuffled = {name: tree[name] for name in sorted(tree)}
    chex.assert_trees_all_equal(params_from_dict(stack, shuffled), params, strict=True)


def test_other_names_are_ignored() -> None:
    """A Flax module holds more than parameters under the names of its attributes."""
    layer = cases.LAYERS["gru"]
    params = cases.random_params(layer)
    tree = params_to_dict(params) | {"layer": layer, "dtype": None}
    chex.assert_trees_all_equal(params_from_dict(layer, tree), params, strict=True)


def test_a_missing_name() -> None:
    layer = cases.LAYERS["gru"]
    tree = params_to_dict(cases.random_params(layer))
    del tree["b_hh"]
    with pytest.raises(KeyError, match="b_hh"):
        params_from_dict(layer, tree)


class Scale(seqjax.Cell):
    """A cell whose parameters are what the test says."""

    input_size = output_size = 3

    def __init__(self, params: Any) -> None:
        self.params = params

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> Any:
        return self.params

    def initial_carry(self, batch_shape: tuple[int, ...] = (), dtype: Any = jnp.float32) -> Any:
        return ()

    def step(self, params: Any, carry: Any, x: jax.Array) -> Any:
        return carry, x


def test_dicts_and_tuples_of_ones_own() -> None:
    params = {"gain": jnp.ones(3), "parts": (jnp.zeros(1), {"deep": jnp.ones(2)})}
    tree = params_to_dict(params)
    assert paths(tree) == ["gain", "parts/layers_0", "parts/layers_1/deep"]
    chex.assert_trees_all_equal(params_from_dict(Scale(params), tree), params, strict=True)


@pytest.mark.parametrize("params", [jnp.ones(3), np.ones(3)], ids=["jax", "numpy"])
def test_a_lone_array_has_no_name(params: Any) -> None:
    with pytest.raises(TypeError, match=r"should be a NamedTuple, tuple or dict .* got a lone"):
        params_to_dict(params)


@pytest.mark.parametrize("shell", SHELLS)
def test_modules_trace_shapes_once(shell: str) -> None:
    """Outside jit, finding them at every call would take longer than a small layer."""
    traced = []

    class Cell(seqjax.GRUCell):
        def init(self, *args: Any) -> Any:
            traced.append(args)
            return super().init(*args)

        def initial_carry(self, *args: Any) -> Any:
            traced.append(args)
            return super().initial_carry(*args)

    module = build(shell, "Recurrent", Cell(3, 4))
    _, carry = module(jnp.ones((5, 2, 3)))
    module(jnp.ones((5, 2, 3)), carry)
    assert traced
    traced.clear()
    module(jnp.ones((7, 2, 3)))
    module(jnp.ones((7, 2, 3)), carry)
    assert not traced
