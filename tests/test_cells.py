"""The cells: their equations, parameters, states, numbers in 16 bit, and arguments."""

import dataclasses
import functools
import re
from typing import Any

import cases
import contract
import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest

import seqjax
from seqjax.ops.dispatch import IMPLEMENTATIONS

KINDS = [seqjax.RNNCell, seqjax.LSTMCell, seqjax.GRUCell]
each_cell = pytest.mark.parametrize("cell", cases.CELLS.values(), ids=cases.CELLS)
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


class TestEquations:
    @each_cell
    def test_step(self, cell: seqjax.Cell, x64: None) -> None:
        case = contract.make_case(cell, (), 1, np.float64)
        expected = numpy_reference.step(cell, case.params, case.carry, case.xs[0])
        step = contract.quick_jit(cell.step)(case.params, case.carry, case.xs[0])
        contract.assert_close(jax.device_get(step), expected, 1e-13)

    @each_cell
    def test_steps(self, cell: seqjax.Cell, x64: None) -> None:
        case = contract.make_case(cell, (4,), 5, np.float64)
        expected = numpy_reference.run(cell, *case[:3])
        got = contract.quick_jit(functools.partial(seqjax.scan, cell))(*case[:3])
        contract.assert_close(jax.device_get(got), expected, 1e-12)

    def test_step_takes_any_batch_shape(self) -> None:
        cell = cases.CELLS["lstm_proj"]
        params = cases.random_params(cell)
        for batch_shape in ((), (4,), (2, 3), (0,)):
            x = cases.random_inputs((*batch_shape, cell.input_size))
            carry, y = jax.eval_shape(cell.step, params, cases.random_carry(cell, batch_shape), x)
            assert y.shape == carry.h.shape == (*batch_shape, 2)
            assert carry.c.shape == (*batch_shape, cases.HIDDEN_SIZE)


class TestParameters:
    @pytest.mark.parametrize(
        ("cell", "shapes"),
        [
            (seqjax.RNNCell(3, 5), {"w_ih": (3, 5), "w_hh": (5, 5), "b_ih": (5,), "b_hh": (5,)}),
            (
                seqjax.GRUCell(3, 5),
                {"w_ih": (3, 15), "w_hh": (5, 15), "b_ih": (15,), "b_hh": (15,)},
            ),
            (
                seqjax.LSTMCell(3, 5),
                {"w_ih": (3, 20), "w_hh": (5, 20), "b_ih": (20,), "b_hh": (20,), "w_hr": None},
            ),
            (
                seqjax.LSTMCell(3, 5, proj_size=2),
                {"w_ih": (3, 20), "w_hh": (2, 20), "b_ih": (20,), "b_hh": (20,), "w_hr": (5, 2)},
            ),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_names_and_shapes(self, cell: seqjax.Cell, shapes: dict[str, Any]) -> None:
        def shapes_of(cell: seqjax.Cell) -> dict[str, Any]:
            params = jax.eval_shape(cell.init, jax.random.key(0))._asdict()
            return {name: None if leaf is None else leaf.shape for name, leaf in params.items()}

        assert shapes_of(cell) == shapes
        without_bias = dataclasses.replace(cell, bias=False)
        assert shapes_of(without_bias) == shapes | {"b_ih": None, "b_hh": None}

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @each_kind
    def test_dtype(self, kind: type[Any], dtype: str) -> None:
        params = jax.eval_shape(lambda: kind(3, 5).init(jax.random.key(0), dtype))
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {dtype}

    @each_cell
    def test_initial_carry_is_zero(self, cell: seqjax.Cell) -> None:
        carry = cell.initial_carry((2, 3))
        jax.tree.map(contract.assert_zero, carry)
        assert {leaf.shape[:-1] for leaf in jax.tree.leaves(carry)} == {(2, 3)}
        first = jax.tree.leaves(cell.initial_carry())[0]
        assert first.shape == (cell.output_size,)
        assert first.dtype == jnp.float32

    def test_cells_are_frozen(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            seqjax.GRUCell(3, 5).hidden_size = 6  # type: ignore[misc]

    def test_defaults_are_pytorchs(self) -> None:
        assert seqjax.LSTMCell(3, 5) == seqjax.LSTMCell(3, 5, bias=True, proj_size=0)
        assert seqjax.RNNCell(3, 5) == seqjax.RNNCell(3, 5, bias=True, nonlinearity="tanh")
        assert seqjax.GRUCell(3, 5) == seqjax.GRUCell(3, 5, bias=True)


class TestSixteenBit:
    @each_implementation
    def test_c_is_not_rounded_at_every_step(self, implementation: str) -> None:
        """c grows by increments that bfloat16 would round away once it is above 1."""
        cell = seqjax.LSTMCell(2, 4)
        case = contract.make_case(cell, (3,), 256, jnp.bfloat16)
        gates = np.repeat([-3.0, 6.0, 0.5, 0.0], cell.hidden_size)  # i, f, g, o
        small = jax.tree.map(lambda leaf: (0.05 * leaf).astype(leaf.dtype), case.params)
        params = small._replace(b_ih=(gates + small.b_ih.astype(float)).astype(jnp.bfloat16))
        zeros = jax.device_get(cell.initial_carry((3,), jnp.bfloat16))
        carry, _ = jax.jit(functools.partial(contract.scan, cell, implementation=implementation))(
            params, case.xs, zeros
        )
        truth, _ = numpy_reference.run(cell, *as_float64((params, case.xs, zeros)))
        assert truth.c.min() > 2
        assert carry.c.dtype == jnp.float32
        np.testing.assert_allclose(carry.c, truth.c, rtol=0.01)

    @each_implementation
    def test_products_are_summed_in_float32(self, implementation: str) -> None:
        """Two products of about 20 cancel; what is left over, 16 bits would have rounded away."""
        cell = seqjax.RNNCell(64, 64)
        case = contract.make_case(cell, (1,), 1, jnp.bfloat16)
        weights = jax.tree.map(lambda leaf: (4 * leaf).astype(leaf.dtype), case.params)
        exact = as_float64(weights)
        params = weights._replace(
            b_ih=(-case.xs[0, 0].astype(float) @ exact.w_ih).astype(jnp.bfloat16),
            b_hh=(-case.carry[0].astype(float) @ exact.w_hh).astype(jnp.bfloat16),
        )
        _, ys = jax.jit(functools.partial(contract.scan, cell, implementation=implementation))(
            params, case.xs, case.carry
        )
        _, truth = numpy_reference.run(cell, *as_float64((params, case.xs, case.carry)))
        assert np.median(np.abs(truth)) > 0.01
        np.testing.assert_allclose(np.asarray(ys, float), truth, rtol=0.01, atol=2e-4)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @each_cell
    def test_every_product_asks_for_float32(self, cell: seqjax.Cell, dtype: str) -> None:
        """XLA may keep more precision than asked for, so numbers alone would not show this."""
        case = contract.abstract_case(cell, (2,), 3, jnp.dtype(dtype))
        program = str(jax.make_jaxpr(functools.partial(seqjax.scan, cell))(*case[:3]))
        products = re.findall(r"(\w+)\[[\d,]*\] = dot_general\[", program)
        # The projection multiplies once more.
        assert products == ["f32"] * (3 if getattr(cell, "proj_size", 0) else 2)

    @each_implementation
    @pytest.mark.parametrize("name", ["rnn_tanh", "lstm", "gru"])
    def test_gradients_are_summed_in_float32(self, name: str, implementation: str) -> None:
        """The weights' gradients are sums over time, which 16 bits would not hold."""
        cell = cases.CELLS[name]
        case = contract.make_case(cell, (4,), 256, jnp.bfloat16)

        @contract.quick_jit
        def gradients(params: Any, xs: Any, carry: Any) -> Any:
            def mean(params: Any) -> jax.Array:
                _, ys = contract.scan(cell, params, xs, carry, implementation=implementation)
                return ys.mean(dtype=wide(ys.dtype))

            return jax.grad(mean)(params)

        got = jax.device_get(gradients(*case[:3]))
        with jax.enable_x64(True):
            truth = jax.device_get(gradients(*as_float64(case[:3])))
        for got_leaf, truth_leaf in zip(jax.tree.leaves(got), jax.tree.leaves(truth), strict=True):
            error = np.abs(got_leaf.astype(float) - truth_leaf).max() / np.abs(truth_leaf).max()
            assert error < 2 * float(jnp.finfo(jnp.bfloat16).eps)


class TestBadArguments:
    @each_kind
    @pytest.mark.parametrize("field", ["input_size", "hidden_size"])
    @pytest.mark.parametrize("value", [0, -1])
    def test_size_below_one(self, kind: type[Any], field: str, value: int) -> None:
        with pytest.raises(ValueError, match=f"{field} must be greater than zero, got: {value}"):
            kind(**{"input_size": 3, "hidden_size": 5} | {field: value})

    @each_kind
    @pytest.mark.parametrize("field", ["input_size", "hidden_size"])
    @pytest.mark.parametrize("value", [5.0, True, "3", None], ids=repr)
    def test_size_no_int(self, kind: type[Any], field: str, value: Any) -> None:
        message = f"{field} should be of type int, got: {type(value).__name__}"
        with pytest.raises(TypeError, match=message):
            kind(**{"input_size": 3, "hidden_size": 5} | {field: value})

    @each_kind
    @pytest.mark.parametrize("value", [1, 0, "yes", None], ids=repr)
    def test_bias_no_bool(self, kind: type[Any], value: Any) -> None:
        message = f"bias should be of type bool, got: {type(value).__name__}"
        with pytest.raises(TypeError, match=message):
            kind(3, 5, bias=value)

    @pytest.mark.parametrize("value", ["sigmoid", "Tanh", "", None], ids=repr)
    def test_unknown_nonlinearity(self, value: Any) -> None:
        with pytest.raises(ValueError, match=f"{value!r}.*'tanh' or 'relu'"):
            seqjax.RNNCell(3, 5, nonlinearity=value)

    @pytest.mark.parametrize("value", [5, 6])
    def test_projection_too_wide(self, value: int) -> None:
        message = f"smaller than hidden_size, got: proj_size={value} and hidden_size=5"
        with pytest.raises(ValueError, match=message):
            seqjax.LSTMCell(3, 5, proj_size=value)

    def test_projection_negative(self) -> None:
        with pytest.raises(ValueError, match=r"proj_size should be a positive integer .*got: -1"):
            seqjax.LSTMCell(3, 5, proj_size=-1)

    @pytest.mark.parametrize("value", [2.0, True, "2", None], ids=repr)
    def test_projection_no_int(self, value: Any) -> None:
        message = f"proj_size should be of type int, got: {type(value).__name__}"
        with pytest.raises(TypeError, match=message):
            seqjax.LSTMCell(3, 5, proj_size=value)


def as_float64(tree: Any) -> Any:
    """The same numbers in NumPy's float64."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), tree)


def wide(dtype: Any) -> Any:
    """A dtype in which a mean can be taken."""
    return jnp.float32 if jnp.dtype(dtype).itemsize < 4 else dtype
