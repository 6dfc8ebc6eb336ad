"""`implementation="xla"` over many chunks, its derivatives of every kind, and `remat`.

The contract and the golden files have sequences of a few steps, which make a single chunk.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import cases
import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shells
from flax import nnx

import seqjax
import seqjax.linen
import seqjax.nnx
from seqjax.ops.whole_sequence import chunks, forward

ROWS = 3
CELLS = {name: cases.CELLS[name] for name in ("rnn_relu", "lstm_proj", "gru")}
each_cell = pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
reverse_or_not = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Chunks of four steps, and in the forward pass of eight where the length allows."""
    jax.clear_caches()  # What was traced before has other chunks.
    monkeypatch.setattr(chunks, "PROJECTED_AT_ONCE", 8 * 16 * 4 * cases.HIDDEN_SIZE)
    monkeypatch.setattr(chunks, "ROWS_PER_CHUNK", 4 * ROWS)
    yield
    jax.clear_caches()


def random_mask(length: int) -> np.ndarray:
    """Gaps, a row of padding alone, and whole chunks of padding at both ends and in the middle."""
    mask = np.random.default_rng(0).random((length, ROWS)) < 0.6
    mask[:, 1] = False
    for start, stop in ((0, 5), (8, 13), (length - 5, length)):
        mask[start:stop] = False
    return mask


def value_and_gradients(
    cell: seqjax.Cell, case: contract.Case, mask: Any, **options: Any
) -> contract.Evaluation:
    return contract.quick_jit(lambda case: contract._evaluate(cell, case, mask, **options))(case)


@pytest.mark.usefixtures("_small_chunks", "x64")
@pytest.mark.parametrize(
    ("name", "direction", "padding"),
    [
        # Chunks are cut, entered and left out alike for every cell; an LSTM has a c besides.
        *itertools.product(["lstm_proj"], ["forward", "reverse"], ["dense", "masked"]),
        ("rnn_relu", "forward", "dense"),
        ("rnn_relu", "reverse", "masked"),
        ("gru", "forward", "masked"),
        ("gru", "reverse", "dense"),
    ],
)
def test_chunks_equal_the_plain_scan(name: str, direction: str, padding: str) -> None:
    """Six chunks of four steps, the last of which lacks one."""
    cell, reverse, masked = CELLS[name], direction == "reverse", padding == "masked"
    case = contract.make_case(cell, (ROWS,), 23, jnp.float64)
    mask = random_mask(23) if masked else None
    run = functools.partial(value_and_gradients, cell, case, mask, reverse=reverse)
    contract.assert_close(run(implementation="xla"), run(implementation="scan"), 1e-11)


@pytest.mark.parametrize(
    ("length", "rows", "expected"),
    [
        (28, 32, 7),  # 8 steps would be 256 rows: the nearest divisor.
        (512, 32, 8),
        (1000, 1, 125),  # Not many more than 128 steps.
        (50, 256, 2),
        (7, 5000, 1),
        (5, 0, 5),
        (1, 3, 1),
        (101, 64, 4),  # No divisor: 26 chunks, and three steps to add.
        (131, 32, 8),
        (1009, 1, 127),  # Eight chunks of 127 lack 7 steps, where 8 of 128 would lack 15.
    ],
)
def test_steps_of_derivative(length: int, rows: int, expected: int) -> None:
    assert chunks.steps_of_derivative(length, rows) == expected


@pytest.mark.parametrize(
    ("length", "rows", "width", "skips", "expected"),
    [
        (512, 32, 256, False, 256),  # 2**21 elements.
        (512, 32, 257, False, 128),
        (512, 1, 256, False, 512),  # One row counts as 16.
        (512, 1, 257, False, 256),
        (512, 1, 256, True, 128),  # Padding is skipped.
        (100, 10**6, 256, False, 4),  # Not less than the derivative's.
        (100, 16, 2048, False, 50),  # Of the divisors up to 64, the largest.
        (1009, 32, 256, False, 253),  # No divisor: four chunks, the last of which lacks three.
    ],
)
def test_steps_of_forward(length: int, rows: int, width: int, skips: bool, expected: int) -> None:
    plan = chunks.Plan(CELLS["gru"], steps=4, reverse=False, unroll=1)
    assert chunks.steps_of_forward(plan, length, rows, width, skips=skips) == expected


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_length_without_divisors_adds_no_program(direction: str) -> None:
    """The step stands in the program as often for a prime number of steps as for another."""
    cell = CELLS["gru"]

    def products(length: int) -> int:
        case = contract.abstract_case(cell, (ROWS,), length, jnp.float32)

        def loss(params: Any, xs: jax.Array) -> jax.Array:
            run = functools.partial(seqjax.scan, implementation="xla")
            return run(cell, params, xs, reverse=direction == "reverse")[1].sum()

        return str(jax.make_jaxpr(jax.grad(loss))(case.params, case.xs)).count("dot_general")

    assert products(1009) == products(1024) > 0


def chunks_to_run(mask: Any, reverse: bool) -> Any:
    return chunks.chunks_to_run(chunks.split(mask, 4), reverse)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("name", "gates"), [("rnn_relu", 0), ("lstm_proj", 4), ("gru", 4)])
def test_no_array_is_saved_twice(name: str, gates: int, masked: bool) -> None:
    """An Elman recurrence's gate is the new h, which is saved anyway."""
    cell = CELLS[name]
    case = contract.abstract_case(cell, (ROWS,), 8, jnp.float32)
    mask = jax.ShapeDtypeStruct((8, ROWS), bool) if masked else None
    plan = chunks.Plan(cell, steps=4, reverse=False, unroll=1)
    save = functools.partial(forward.forward_and_save, plan)
    _, residuals = jax.eval_shape(save, case.params, cell.split_carry(case.carry), case.xs, mask)
    assert len(jax.tree.leaves(residuals.saved)) == gates


class TestPaddingIsNotComputed:
    @reverse_or_not
    def test_chunks_of_padding_are_left_out(self, reverse: bool) -> None:
        mask = np.zeros((20, 2), bool)
        mask[[0, 9, 18], [0, 1, 0]] = True
        order, count = chunks_to_run(jnp.asarray(mask), reverse)
        assert count == 3
        np.testing.assert_array_equal(order[:3], [4, 2, 0] if reverse else [0, 2, 4])

    def test_nothing_valid_runs_nothing(self) -> None:
        _, count = chunks_to_run(jnp.zeros((20, 2), bool), reverse=False)
        assert count == 0

    def test_vmapped_sequences_share_one_loop(self) -> None:
        """The number of chunks is one for all of them: the longest decides."""
        mask = np.arange(20)[:, None] < np.array([[3], [9], [0]])[:, :, None] * np.ones(1)
        mask = jnp.asarray(np.moveaxis(np.broadcast_to(mask, (3, 20, 1)), 0, 0))

        def count(mask: jax.Array) -> jax.Array:
            return chunks_to_run(mask, reverse=False)[1]

        assert jax.vmap(count, out_axes=None)(mask) == 3
        assert jax.vmap(jax.vmap(count, out_axes=None), out_axes=None)(mask[None]) == 3

    @pytest.mark.usefixtures("_small_chunks")
    def test_gradients_under_vmap(self) -> None:
        """Sequences of different lengths, one by one and mapped."""
        cell = CELLS["gru"]
        case = contract.make_case(cell, (ROWS,), 20)
        mask = jnp.arange(20)[:, None] < jnp.array([20, 0, 7])

        def loss(params: Any, xs: Any, mask: Any) -> jax.Array:
            return jnp.sin(seqjax.scan(cell, params, xs, mask=mask, implementation="xla")[1]).sum()

        mapped = jax.vmap(loss, in_axes=(None, 1, 1))
        got = contract.quick_jit(jax.grad(lambda *args: mapped(*args).sum()))
        expected = contract.quick_jit(jax.grad(loss))
        args = (case.params, case.xs, mask)
        contract.assert_close(got(*args), expected(*args))
        each = contract.quick_jit(jax.vmap(jax.grad(loss), in_axes=(None, 1, 1)))(*args)
        contract.assert_close(jax.tree.map(lambda leaf: leaf.sum(0), each), expected(*args))


@pytest.mark.usefixtures("x64")
@each_cell
class TestEveryDerivative:
    """Forward mode and higher orders need no other implementation."""

    def derivatives_agree(self, cell: seqjax.Cell, transform: Callable[..., Any]) -> None:
        params = cases.random_params(cell, dtype=jnp.float64)
        xs = cases.random_inputs((5, 2, cases.INPUT_SIZE), dtype=jnp.float64)
        mask = jnp.asarray(np.random.default_rng(1).random((5, 2)) < 0.7)

        def loss(implementation: str, params: Any, xs: jax.Array) -> jax.Array:
            carry, ys = seqjax.scan(cell, params, xs, mask=mask, implementation=implementation)
            return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves((carry, ys)))

        def run(implementation: str) -> Any:
            function = transform(functools.partial(loss, implementation))
            return contract.quick_jit(function)(params, xs)

        contract.assert_close(run("xla"), run("scan"), 1e-10)

    def test_forward_mode(self, cell: seqjax.Cell) -> None:
        self.derivatives_agree(cell, lambda f: jax.jacfwd(f, argnums=(0, 1)))

    def test_hessian(self, cell: seqjax.Cell) -> None:
        self.derivatives_agree(cell, lambda f: jax.jacfwd(jax.grad(f), argnums=1))

    def test_gradient_of_a_gradient(self, cell: seqjax.Cell) -> None:
        def penalty(f: Any) -> Any:
            def norm(params: Any, xs: Any) -> jax.Array:
                return jnp.square(jax.grad(f, argnums=1)(params, xs)).sum()

            return jax.grad(norm, argnums=(0, 1))

        self.derivatives_agree(cell, penalty)


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("length", [23, 24])
def test_unrolling_changes_nothing(length: int) -> None:
    """Three chunks of eight steps in the forward pass, the last of which may lack one."""
    cell = CELLS["gru"]
    case = contract.make_case(cell, (ROWS,), length)

    def run(unroll: int) -> Any:
        run = functools.partial(seqjax.scan, implementation="xla", unroll=unroll)
        return contract.quick_jit(functools.partial(run, cell))(case.params, case.xs, case.carry)

    contract.assert_close(run(3), run(1))


@pytest.mark.usefixtures("_small_chunks", "x64")
@reverse_or_not
@pytest.mark.parametrize("name", ["lstm_proj", "gru"])
def test_derivatives_where_a_chunk_lacks_steps(name: str, reverse: bool) -> None:
    """Forward mode and second derivatives, of the final state, too."""
    cell = CELLS[name]
    case = contract.make_case(cell, (ROWS,), 11, jnp.float64)  # Three chunks of four lack one.
    direction = jax.tree.map(np.cos, case)

    def loss(implementation: str, params: Any, xs: Any, carry: Any) -> jax.Array:
        run = functools.partial(seqjax.scan, reverse=reverse, implementation=implementation)
        carry, ys = run(cell, params, xs, carry)
        return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves((carry, ys[1:], ys[:1])))

    def second(implementation: str) -> Any:
        gradient = jax.grad(functools.partial(loss, implementation), argnums=(0, 1, 2))
        forward = functools.partial(jax.jvp, functools.partial(loss, implementation))
        return contract.quick_jit(lambda at, by: (forward(at, by), jax.jvp(gradient, at, by)))(
            case[:3], direction[:3]
        )

    contract.assert_close(second("xla"), second("scan"), 1e-10)


@each_cell
@pytest.mark.parametrize("argument", ["params", "xs", "carry"])
def test_gradient_of_one_argument_alone(cell: seqjax.Cell, argument: str) -> None:
    """What does not move is left out of the derivative."""
    case = contract.make_case(cell, (ROWS,), 4)

    def gradient(implementation: str) -> Any:
        def loss(value: Any) -> jax.Array:
            params, xs, carry, _ = case._replace(**{argument: value})
            _, ys = seqjax.scan(cell, params, xs, carry, implementation=implementation)
            return jnp.sin(ys).sum()

        return contract.quick_jit(jax.grad(loss))(getattr(case, argument))

    contract.assert_close(gradient("xla"), gradient("scan"))


class TestWhereItDoesNotApply:
    def test_a_cell_without_gates(self) -> None:
        cell = shells.LeakyCell(3, 5)
        params, xs = cases.random_params(cell), cases.random_inputs((4, 2, 3))
        seqjax.scan(cell, params, xs)  # The default always applies.
        message = "implementation 'xla' does not apply: this cell is no GatedCell.*None or 'scan'"
        with pytest.raises(ValueError, match=message):
            seqjax.scan(cell, params, xs, implementation="xla")

    def test_a_derived_cell_with_another_step(self) -> None:
        """The step is the meaning: what its gates would give does not stand in for it."""

        class Doubled(seqjax.GRUCell):
            def step(self, params: Any, carry: Any, x: Any) -> Any:
                carry, y = super().step(params, carry, x)
                return carry, 2 * y

        cell = CELLS["gru"]
        doubled = Doubled(cell.input_size, cell.hidden_size)
        params, xs = cases.random_params(cell), cases.random_inputs((4, 2, 3))
        _, expected = seqjax.scan(cell, params, xs)
        np.testing.assert_allclose(seqjax.scan(doubled, params, xs)[1], 2 * expected, rtol=1e-5)
        with pytest.raises(ValueError, match="Doubled has a step of its own"):
            seqjax.scan(doubled, params, xs, implementation="xla")


class TestRemat:
    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize("implementation", ["scan", "xla"])
    @reverse_or_not
    def test_values_and_gradients_stay(self, reverse: bool, implementation: str) -> None:
        """Five chunks of four steps, and three steps more."""
        cell = CELLS["lstm_proj"]
        case = contract.make_case(cell, (ROWS,), 23, jnp.float64)
        mask = random_mask(23)

        def loss(params: Any, xs: Any, carry: Any, remat: bool) -> Any:
            carry, ys = seqjax.scan(
                cell, params, xs, carry, mask=mask, reverse=reverse,
                implementation=implementation, remat=remat,
            )  # fmt: skip
            return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves((carry, ys)))

        def run(remat: bool) -> Any:
            function = functools.partial(loss, remat=remat)
            return contract.quick_jit(jax.value_and_grad(function, argnums=(0, 1, 2)))(*case[:3])

        contract.assert_close(run(True), run(False), 1e-11)

    @pytest.mark.parametrize("implementation", ["scan", "xla"])
    def test_memory_grows_with_the_root(self, implementation: str) -> None:
        """Sixteen times the steps take about four times the memory."""
        cell = seqjax.LSTMCell(1, 32)

        def temporaries(length: int, remat: bool) -> int:
            def loss(params: Any, xs: jax.Array) -> jax.Array:
                carry, _ = seqjax.scan(cell, params, xs, implementation=implementation, remat=remat)
                return carry.h.sum()

            case = contract.abstract_case(cell, (64,), length, jnp.float32)
            compiled = contract.quick_jit(jax.grad(loss)).lower(case.params, case.xs).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        assert temporaries(1024, remat=False) > 8 * temporaries(64, remat=False)
        assert temporaries(1024, remat=True) < 0.25 * temporaries(1024, remat=False)

    def test_modules_pass_it_on(self) -> None:
        xs = cases.random_inputs((9, 2, 3))
        key = jax.random.key(0)

        def programs(remat: bool) -> Iterator[str]:
            for module in (
                seqjax.nnx.GRU(3, 5, rngs=nnx.Rngs(0), remat=remat),
                seqjax.nnx.Recurrent(CELLS["gru"], rngs=nnx.Rngs(0), remat=remat),
            ):
                yield str(jax.make_jaxpr(module)(xs))
            for module in (
                seqjax.linen.GRU(3, 5, remat=remat),
                seqjax.linen.Recurrent(CELLS["gru"], remat=remat),
            ):
                yield str(jax.make_jaxpr(module.init_with_output)(key, xs))

        chunks = "f32[3,3,2,3]"  # Nine steps in chunks of three.
        assert all(chunks in program for program in programs(remat=True))
        assert not any(chunks in program for program in programs(remat=False))

    def test_not_a_bool(self) -> None:
        cell = CELLS["gru"]
        with pytest.raises(TypeError, match="remat should be of type bool, got: int"):
            seqjax.scan(cell, cases.random_params(cell), cases.random_inputs((4, 3)), remat=1)
