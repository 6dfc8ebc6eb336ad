"""Cells of gates that are not in the library: the contract, both shells, and what is refused."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import cases
import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shells
import test_contract
from user_cells import CELLS, CoupledCarry, SharpCell, numpy_step

import seqjax
from seqjax.ops.dispatch import IMPLEMENTATIONS

each_cell = pytest.mark.parametrize("name", CELLS)


def checks() -> Iterator[Any]:
    """Every check of the contract, the program that they share first."""
    every = [
        *test_contract.EVERYWHERE,
        *test_contract.IN_FULL,
        *test_contract.WITH_STEP,
        contract.check_dtypes_are_kept,
        contract.check_16_bit_is_close_to_truth,
    ]
    for name in CELLS:
        yield pytest.param(contract.check_is_the_whole_sequence, name, None, id=f"{name}-default")
        yield pytest.param(contract.check_jit_equals_eager, name, None, id=f"{name}-eager")
        for implementation in IMPLEMENTATIONS:
            for check in every:
                label = f"{name}-{implementation}-{check.__name__}"
                yield pytest.param(check, name, implementation, id=label)


@pytest.mark.parametrize(("check", "name", "implementation"), [*checks()])
def test_contract_holds(check: Callable, name: str, implementation: str | None) -> None:
    check(CELLS[name], implementation)


@each_cell
def test_cell_is_a_value(name: str) -> None:
    contract.check_layer_is_a_value(CELLS[name])


@each_cell
def test_equation(name: str, x64: None) -> None:
    """A step, and a sequence with a mask, against NumPy."""
    cell = CELLS[name]
    case = contract.make_case(cell, (4,), 5, np.float64)
    mask = np.random.default_rng(0).random((5, 4)) < 0.7
    carry, ys = case.carry, []
    for x, valid in zip(case.xs, mask, strict=True):
        new = numpy_step(name, case.params, carry, x)
        h = new.h if isinstance(new, tuple) else new
        ys.append(np.where(valid[:, None], h, 0))
        keep = functools.partial(np.where, valid[:, None])
        carry = jax.tree.map(keep, new, carry)
    got = contract.quick_jit(functools.partial(seqjax.scan, cell))(*case[:3], mask=mask)
    contract.assert_close(jax.device_get(got), (carry, np.stack(ys)), 1e-12)

    step = jax.device_get(cell.step(case.params, case.carry, case.xs[0]))
    expected = numpy_step(name, case.params, case.carry, case.xs[0])
    contract.assert_close(step[0], expected, 1e-13)


@each_cell
@pytest.mark.parametrize("order", ["forward mode", "hessian"])
def test_every_derivative(name: str, order: str, x64: None) -> None:
    cell = CELLS[name]
    params = cases.random_params(cell, dtype=jnp.float64)
    xs = cases.random_inputs((4, 2, cases.INPUT_SIZE), dtype=jnp.float64)
    mask = np.random.default_rng(1).random((4, 2)) < 0.7

    def run(implementation: str) -> Any:
        def loss(params: Any, xs: jax.Array) -> jax.Array:
            carry, ys = seqjax.scan(cell, params, xs, mask=mask, implementation=implementation)
            return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves((carry, ys)))

        if order == "hessian":
            return contract.quick_jit(jax.jacfwd(jax.grad(loss), argnums=1))(params, xs)
        return contract.quick_jit(jax.jacfwd(loss, argnums=(0, 1)))(params, xs)

    contract.assert_close(run("xla"), run("scan"), 1e-10)


@each_cell
@pytest.mark.parametrize("shell", shells.SHELLS)
def test_as_a_module(name: str, shell: str) -> None:
    """`Recurrent`, in a stack and both directions, with lengths: what the core gives."""
    cell = CELLS[name]
    layer = seqjax.Stack([seqjax.Bidirectional(cell, cell), seqjax.GRUCell(10, 4)])
    model = shells.build(shell, "Recurrent", layer, batch_first=True)
    params = cases.random_params(layer)
    xs = cases.random_inputs((6, 3, cases.INPUT_SIZE))
    lengths = np.array([6, 0, 2])
    output, carry = model(jnp.swapaxes(xs, 0, 1), lengths=lengths)
    mask = seqjax.lengths_to_mask(lengths, 6)
    expected_carry, ys = seqjax.scan(layer, params, xs, mask=mask)
    shells.assert_same(output, jnp.swapaxes(ys, 0, 1))
    shells.assert_same(carry, expected_carry)


@pytest.mark.parametrize("bias", [0.0, -20.0])
@pytest.mark.parametrize("padding", ["left", "right", "added"])
def test_a_combine_that_divides(padding: str, bias: float) -> None:
    """What padding leaves behind becomes no NaN, and a small gate keeps its digits."""
    cell = SharpCell(cases.INPUT_SIZE, cases.HIDDEN_SIZE)
    length = 131 if padding == "added" else 20
    case = contract.make_case(cell, (3,), length)
    zeros = jax.tree.map(np.zeros_like, case.carry)
    case = case._replace(carry=zeros, params=case.params._replace(b_ih=case.params.b_ih + bias))
    steps = np.arange(20)[:, None]
    mask = {"left": steps > np.array([3, 0, 19]), "right": steps < np.array([3, 0, 19])}.get(
        padding
    )
    run = functools.partial(contract.evaluate, cell, case, mask)
    got, expected = run(implementation="xla"), run(implementation="scan")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())


def test_second_derivatives_beside_padding(x64: None) -> None:
    """What is kept of chunks that are left out is nothing that `combine` cannot divide by."""
    cell = SharpCell(cases.INPUT_SIZE, cases.HIDDEN_SIZE)
    case = contract.make_case(cell, (3,), 256, np.float64)
    mask = seqjax.lengths_to_mask([3, 0, 9], 256)

    def run(implementation: str) -> Any:
        def loss(params: Any, xs: Any) -> jax.Array:
            carry, ys = seqjax.scan(cell, params, xs, mask=mask, implementation=implementation)
            return jnp.sin(ys).sum() + jnp.sin(carry.c).sum()

        def penalty(params: Any, xs: Any) -> jax.Array:
            gradients = jax.grad(loss, argnums=(0, 1))(params, xs)
            return sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(gradients))

        return contract.quick_jit(jax.grad(penalty, argnums=(0, 1)))(case.params, case.xs)

    contract.assert_close(run("xla"), run("scan"), 1e-10)


def test_decoding() -> None:
    """Greedily, by steps: what a loop gives."""
    cell = CELLS["coupled"]
    params, table = cases.random_params(cell), cases.random_inputs((5, cases.INPUT_SIZE))

    def step(carry: Any, token: jax.Array) -> Any:
        carry, y = cell.step(params, carry, table[token])
        return carry, y  # As many units as tokens.

    written = seqjax.generate(
        step, cell.initial_carry((2,)), [[1, 2]], max_tokens=6, temperature=0.0
    )
    carry, token = cell.initial_carry((2,)), jnp.array([1, 2])
    for got in written.tokens:
        carry, scores = step(carry, token)
        token = scores.argmax(-1)
        np.testing.assert_array_equal(got, token)


class TestParameters:
    def test_what_follows_from_the_gates(self) -> None:
        cell = CELLS["coupled"]
        params = cell.init(jax.random.key(0))
        assert isinstance(params, seqjax.GatedParams)
        shapes = [leaf.shape for leaf in params]
        assert shapes == [(3, 15), (5, 15), (15,), (15,)]
        assert 0.4 < float(abs(params.w_hh).max()) <= 5**-0.5
        carry = cell.initial_carry((2,), jnp.bfloat16)
        assert isinstance(carry, CoupledCarry)
        assert [leaf.dtype for leaf in carry] == [jnp.bfloat16, jnp.float32, jnp.float32]

    def test_cells_of_other_classes_differ(self) -> None:
        assert len({*CELLS.values(), seqjax.GRUCell(3, 5), seqjax.RNNCell(3, 5)}) == 5


def cell_of(gates: Any, combine: Callable[..., Any]) -> seqjax.GatedCell:
    kind: Any = type("OwnCell", (seqjax.GatedCell,), {"gates": gates, "combine": combine})
    return kind(3, 5)


def scan(cell: seqjax.GatedCell) -> Any:
    return seqjax.scan(cell, cell.init(jax.random.key(0)), jnp.ones((4, 2, 3)))


def one_step(cell: seqjax.GatedCell) -> Any:
    return cell.step(cell.init(jax.random.key(0)), cell.initial_carry((2,)), jnp.ones((2, 3)))


SIGMOID = {"z": jax.nn.sigmoid}


class TestWhatIsRefused:
    """A derivative derived from it would be wrong, and no result would show it."""

    @pytest.mark.parametrize("run", [scan, one_step])
    @pytest.mark.parametrize(
        ("combine", "operation"),
        [
            (lambda self, gates, h: gates.z * h.mean(), "reduce_sum"),
            (lambda self, gates, h: gates.z * jnp.max(h), "reduce_max"),
            (lambda self, gates, h: gates.z * jnp.flip(h), "rev"),
            (lambda self, gates, h: gates.z * jnp.roll(h, 1), "reshape"),
            (lambda self, gates, h: gates.z / jnp.linalg.norm(h), "reduce_sum"),
        ],
    )
    def test_combine_over_all_axes(self, combine: Any, operation: str, run: Any) -> None:
        message = f"OwnCell.combine and its activations should be elementwise, got: .*{operation}"
        with pytest.raises(TypeError, match=message):
            run(cell_of(SIGMOID, combine))

    @pytest.mark.parametrize("run", [scan, one_step])
    @pytest.mark.parametrize(
        ("gates", "combine"),
        [
            (SIGMOID, lambda self, gates, h: jax.nn.softmax(gates.z) * h),
            (SIGMOID, lambda self, gates, h: gates.z * jnp.cumsum(h, -1)),
            (SIGMOID, lambda self, gates, h: gates.z * h[..., ::-1]),
            (SIGMOID, lambda self, gates, h: gates.z @ jnp.ones((5, 5))),
            ({"z": jax.nn.softmax}, lambda self, gates, h: gates.z * h),
        ],
    )
    def test_combine_along_an_axis(self, gates: Any, combine: Any, run: Any) -> None:
        with pytest.raises((ValueError, IndexError, TypeError)) as caught:
            run(cell_of(gates, combine))
        assert any("should be elementwise" in note for note in caught.value.__notes__)

    @pytest.mark.parametrize(
        ("combine", "got"),
        [
            (lambda self, gates, h: (gates.z, h), r"\(\(\(\), 'float32'\), \(\(\), 'float32'\)\)"),
            (lambda self, gates, h: None, "None"),
            (lambda self, gates, h: gates.z > 0, r"\(\(\), 'bool'\)"),
            (lambda self, gates, h: gates.z * jnp.arange(5.0), r"\(\(5,\), 'float32'\)"),
        ],
    )
    def test_combine_returns_another_carry(self, combine: Any, got: str) -> None:
        message = rf"combine should return a carry like the one that it gets.*got: {got}"
        with pytest.raises(TypeError, match=message):
            scan(cell_of(SIGMOID, combine))

    @pytest.mark.parametrize(
        "gates",
        [{}, ["z"], {"z": "sigmoid"}, {"1z": None}, {1: None}, {"class": None}, {"_z": None}, None],
        ids=repr,
    )
    def test_gates(self, gates: Any) -> None:
        message = "OwnCell.gates should map at least one name to an activation.*got: "
        with pytest.raises(TypeError, match=message):
            cell_of(gates, lambda self, gates, h: h)

    def test_carry_type(self) -> None:
        with pytest.raises(TypeError, match="carry_type should be None or a NamedTuple"):
            type("OwnCell", (seqjax.GatedCell,), {"gates": SIGMOID, "carry_type": tuple})

    def test_no_gates_at_all(self) -> None:
        class Nothing(seqjax.GatedCell):
            pass

        with pytest.raises(TypeError, match="abstract"):
            Nothing(3, 5)

    def test_a_misspelt_gate(self) -> None:
        with pytest.raises(AttributeError, match="no attribute 'zz'"):
            scan(cell_of(SIGMOID, lambda self, gates, h: gates.zz))
