"""`seqjax.scan`: derivatives, shapes, masks, tracing, layers of one's own, and bad arguments."""

import dataclasses
import functools
from typing import Any

import cases
import contract
import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax import lax, monitoring
from jax.flatten_util import ravel_pytree
from jax.test_util import check_grads, check_jvp, check_vjp

import seqjax

LSTM = cases.LAYERS["lstm"]
MIXED = seqjax.Stack(
    [
        seqjax.Bidirectional(seqjax.LSTMCell(3, 4, proj_size=2), seqjax.GRUCell(3, 3)),
        seqjax.RNNCell(5, 4),
    ]
)
"""One of everything."""

few_examples = settings(deadline=None, derandomize=True, max_examples=10)
many_examples = settings(deadline=None, derandomize=True, max_examples=100)


class TestDerivatives:
    """Against finite differences, in float64, with a mask and an initial carry."""

    MASK = np.array([[1, 0], [0, 1], [1, 1]], bool)

    def flat_scan(self, layer: seqjax.Layer, **options: Any) -> tuple[np.ndarray, Any, Any]:
        """`scan` from one vector to another one, where to evaluate it, and a cotangent."""
        case = contract.make_case(layer, (2,), len(self.MASK), np.float64)
        flat, unflatten = ravel_pytree(case[:3])

        def run(flat: jax.Array) -> jax.Array:
            results = seqjax.scan(layer, *unflatten(flat), mask=self.MASK, **options)
            return ravel_pytree(results)[0]

        return flat, run, ravel_pytree(case.cotangents)[0]

    def test_gradient_and_its_derivatives(self, x64: None) -> None:
        """Values and gradient as one function, differentiated forward and in reverse.

        Cell by cell they are compared with the plain scan's in `test_whole_sequence.py`.
        """
        flat, run, cotangent = self.flat_scan(MIXED)

        def both(flat: jax.Array) -> tuple[jax.Array, jax.Array]:
            values, pullback = jax.vjp(run, flat)
            return values, pullback(cotangent)[0]

        function = contract.quick_jit(both)
        forward = contract.quick_jit(functools.partial(jax.jvp, both))
        reverse = contract.quick_jit(lambda flat, cotangents: jax.vjp(both, flat)[1](cotangents))
        check_jvp(function, forward, (flat,))
        check_vjp(function, lambda x: (function(x), functools.partial(reverse, x)), (flat,))

    @pytest.mark.parametrize("layer", [cases.CELLS["lstm_proj"], MIXED], ids=["lstm_proj", "mixed"])
    def test_every_order_and_mode(self, layer: seqjax.Layer, x64: None) -> None:
        """The plain scan, in two steps, with a mask: a cell to the second order.

        It has no derivative of its own, so that one cell shows that nothing breaks JAX's.
        """
        case = contract.make_case(layer, (2,), 2, np.float64)
        flat, unflatten = ravel_pytree(case[:3])

        def run(flat: jax.Array) -> jax.Array:
            return ravel_pytree(
                seqjax.scan(layer, *unflatten(flat), mask=self.MASK[:2], implementation="scan")
            )[0]

        # Step by step in Python: compiling every order and mode would take ten times as long.
        with jax.disable_jit():
            order = 2 if isinstance(layer, seqjax.Cell) else 1
            check_grads(run, (flat,), order=order, modes=("fwd", "rev"))

    @pytest.mark.parametrize("implementation", [None, "scan"])
    def test_default_has_every_mode(self, implementation: str | None, x64: None) -> None:
        """What needs no choice of implementation must not take a mode of derivative away."""
        flat, run, _ = self.flat_scan(MIXED, implementation=implementation)

        def forward(function: Any) -> Any:
            return lambda x: jax.jvp(function, (x,), (x,))[1]

        def reverse(function: Any) -> Any:
            return jax.grad(lambda x: function(x).sum())

        for derivative in (forward(run), forward(forward(run)), reverse(reverse(run)),
                           forward(reverse(run)), reverse(forward(run))):  # fmt: skip
            assert jax.eval_shape(derivative, flat).dtype == jnp.float64


class TestAnyMask:
    """Against the reference in NumPy, which only ever sees valid steps."""

    @functools.cached_property
    def case(self) -> contract.Case:
        return contract.make_case(MIXED, (3,), 5, np.float64)

    @functools.cached_property
    def run(self) -> Any:
        return contract.quick_jit(lambda mask: seqjax.scan(MIXED, *self.case[:3], mask=mask))

    @many_examples
    @given(mask=hnp.arrays(bool, (5, 3)))
    def test_any_pattern(self, mask: np.ndarray) -> None:
        with jax.enable_x64(True):
            got = jax.device_get(self.run(mask))
        contract.assert_close(got, numpy_reference.run(MIXED, *self.case[:3], mask), 1e-12)

    @many_examples
    @given(lengths=hnp.arrays(np.int32, 3, elements=st.integers(0, 5)))
    def test_any_lengths(self, lengths: np.ndarray) -> None:
        with jax.enable_x64(True):
            got = jax.device_get(self.run(seqjax.lengths_to_mask(lengths, 5)))
        mask = np.array([[step < length for length in lengths] for step in range(5)])
        contract.assert_close(got, numpy_reference.run(MIXED, *self.case[:3], mask), 1e-12)


class TestShapes:
    @few_examples
    @given(
        steps=st.integers(0, 4),
        batch_shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
        reverse=st.booleans(),
    )
    def test_any_shape(self, steps: int, batch_shape: tuple[int, ...], reverse: bool) -> None:
        """No steps, no rows, no batch dimension, many: always as one batch dimension."""
        case = contract.make_case(LSTM, batch_shape, steps)
        mask = np.random.default_rng(0).random((steps, *batch_shape)) < 0.6
        run = contract.quick_jit(functools.partial(seqjax.scan, LSTM, reverse=reverse))
        carry, ys = run(*case[:3], mask=mask)
        assert ys.shape == (steps, *batch_shape, cases.HIDDEN_SIZE)

        flat = int(np.prod(batch_shape))
        flat_carry = jax.tree.map(lambda leaf: leaf.reshape(flat, leaf.shape[-1]), case.carry)
        order = np.s_[::-1] if reverse else np.s_[:]
        expected_carry, expected_ys = flat_carry, np.zeros((steps, flat, cases.HIDDEN_SIZE))
        if flat and steps:
            expected_carry, expected_ys = numpy_reference.run(
                LSTM,
                case.params,
                case.xs.reshape(steps, flat, cases.INPUT_SIZE)[order],
                flat_carry,
                mask.reshape(steps, flat)[order],
            )
        np.testing.assert_allclose(ys.reshape(expected_ys.shape), expected_ys[order], atol=1e-5)
        for got, want in zip(carry, expected_carry, strict=True):
            np.testing.assert_allclose(got.reshape(want.shape), want, atol=1e-5)

    @pytest.mark.parametrize("unroll", [2, 4, 5, 9])
    def test_unroll_changes_nothing(self, unroll: int) -> None:
        """Also where it does not divide the number of steps, or exceeds it."""
        case = contract.make_case(MIXED, (6,), 5)
        run = contract.quick_jit(functools.partial(seqjax.scan, MIXED), static_argnames="unroll")
        mask = contract.MASK[:5]
        expected = run(*case[:3], mask=mask)
        contract.assert_close(run(*case[:3], mask=mask, unroll=unroll), expected)


class TestArguments:
    def test_no_carry_is_zeros(self) -> None:
        case = contract.make_case(LSTM)
        run = jax.jit(functools.partial(seqjax.scan, LSTM))
        zeros = jax.tree.map(np.zeros_like, case.carry)
        contract.assert_close(run(case.params, case.xs), run(case.params, case.xs, zeros), 0)

    def test_no_mask_is_all_valid(self) -> None:
        case = contract.make_case(MIXED)
        run = contract.quick_jit(functools.partial(seqjax.scan, MIXED))
        contract.assert_close(run(*case[:3], mask=contract.ALL_VALID), run(*case[:3]))

    def test_numpy_arrays_and_jax_arrays(self) -> None:
        case = contract.make_case(LSTM)
        expected = seqjax.scan(LSTM, *case[:3], mask=contract.MASK)
        on_device = jax.tree.map(jnp.asarray, case)
        got = seqjax.scan(LSTM, *on_device[:3], mask=jnp.asarray(contract.MASK))
        contract.assert_close(got, expected, 0)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(expected))

    def test_results_are_carry_then_outputs(self) -> None:
        case = contract.make_case(LSTM)
        carry, ys = seqjax.scan(LSTM, *case[:3])
        assert isinstance(carry, seqjax.LSTMCarry)
        np.testing.assert_array_equal(carry.h, ys[-1])

    @pytest.mark.parametrize("dtype", [np.uint8, np.int32])
    def test_traced_lengths(self, dtype: Any) -> None:
        case = contract.make_case(MIXED)

        @contract.quick_jit
        def run(lengths: jax.Array) -> Any:
            mask = seqjax.lengths_to_mask(lengths, contract.STEPS)
            return seqjax.scan(MIXED, *case[:3], mask=mask)

        for lengths in ([6, 3, 0, 1, 5, 2], [0, 0, 6, 6, 1, 1]):
            mask = np.array([[step < length for length in lengths] for step in range(6)])
            carry, ys = numpy_reference.run(MIXED, *case[:3], mask)
            got = jax.device_get(run(np.array(lengths, dtype)))
            np.testing.assert_allclose(got[1], ys, atol=1e-5)
            jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), got[0], carry)
        assert run._cache_size() == 1


@dataclasses.dataclass(frozen=True)
class LeakyMean(seqjax.Cell):
    """A cell of one's own, which counts how often Python runs its step."""

    input_size: int
    rate: float = 0.25
    calls: list[int] = dataclasses.field(default_factory=list, compare=False)

    @property
    def output_size(self) -> int:
        return self.input_size

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
        return {"scale": jax.random.normal(key, (self.input_size,), dtype)}

    def initial_carry(self, batch_shape: tuple[int, ...] = (), dtype: Any = jnp.float32) -> Any:
        return {"mean": jnp.zeros((*batch_shape, self.input_size), dtype)}

    def step(self, params: Any, carry: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        self.calls.append(1)
        mean = (1 - self.rate) * carry["mean"] + self.rate * jnp.einsum(
            "i,...i->...i", params["scale"], x
        )
        return {"mean": mean}, mean


@dataclasses.dataclass(frozen=True)
class Cumulative(seqjax.Layer):
    """A layer of one's own without a step: running sums, by a whole-sequence operation."""

    input_size: int

    @property
    def output_size(self) -> int:
        return self.input_size

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> tuple[()]:
        return ()

    def initial_carry(self, batch_shape: tuple[int, ...] = (), dtype: Any = jnp.float32) -> Any:
        return jnp.zeros((*batch_shape, self.input_size), dtype)

    def step(self, params: Any, carry: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        raise NotImplementedError

    def run(
        self, params: Any, carry: Any, xs: jax.Array, *, mask: Any, reverse: bool, **_: Any
    ) -> tuple[Any, jax.Array]:
        sums = carry[None] + lax.cumsum(xs, reverse=reverse)
        ys = sums if mask is None else jnp.where(mask[..., None], sums, 0)
        return carry + xs.sum(axis=0), ys


class CumulativeCell(LeakyMean):
    """A cell of one's own with a `run` of its own."""

    init = Cumulative.init  # type: ignore[assignment]
    initial_carry = Cumulative.initial_carry  # type: ignore[assignment]
    run = Cumulative.run  # type: ignore[assignment]


class TestLayersOfOnesOwn:
    def test_cell(self) -> None:
        cell = LeakyMean(3)
        case = contract.make_case(cell)
        carry, ys = seqjax.scan(cell, *case[:3], mask=contract.MASK)
        mean = case.carry["mean"].copy()
        for x, valid, y in zip(case.xs, contract.MASK, ys, strict=True):
            new = 0.75 * mean + 0.25 * case.params["scale"] * x
            mean = np.where(valid[:, None], new, mean)
            np.testing.assert_allclose(y, np.where(valid[:, None], new, 0), atol=1e-6)
        np.testing.assert_allclose(carry["mean"], mean, atol=1e-6)

    @pytest.mark.parametrize("layer", [Cumulative(3), CumulativeCell(3)])
    def test_layer(self, layer: seqjax.Layer) -> None:
        xs = np.random.default_rng(0).standard_normal((6, 6, 3)).astype(np.float32)
        xs[~contract.MASK] = np.nan  # scan zeroes it before the layer sees it.
        _, ys = seqjax.scan(layer, (), xs, mask=contract.MASK)
        sums = np.cumsum(np.where(contract.MASK[..., None], xs, 0), axis=0)
        expected = np.where(contract.MASK[..., None], sums, 0)
        np.testing.assert_allclose(ys, expected, atol=1e-5)

    def test_among_others(self) -> None:
        stack = seqjax.Stack([seqjax.Bidirectional(LeakyMean(3), Cumulative(3)), LeakyMean(6)])
        case = contract.make_case(stack)
        _, ys = seqjax.scan(stack, *case[:3], mask=contract.MASK)
        _, below = seqjax.scan(
            stack.layers[0], case.params[0], case.xs, case.carry[0], mask=contract.MASK
        )
        expected = seqjax.scan(
            stack.layers[1], case.params[1], below, case.carry[1], mask=contract.MASK
        )[1]
        contract.assert_close(ys, expected)


class TestStateOfPadding:
    """A row that is padding alone reads no state: none reaches gradients, whatever it is."""

    MASK = contract.MASK & ~np.isin(np.arange(contract.MASK.shape[1]), 1)

    @pytest.mark.parametrize("implementation", ["scan", "xla"])
    @pytest.mark.parametrize("layer", [cases.CELLS["lstm"], MIXED], ids=["lstm", "mixed"])
    def test_no_number(self, layer: seqjax.Layer, implementation: str) -> None:
        case = contract.make_case(layer)

        def run(carry: Any) -> Any:
            def loss(params: Any, xs: Any, carry: Any) -> Any:
                result = seqjax.scan(
                    layer, params, xs, carry, mask=self.MASK, implementation=implementation
                )
                return sum(jnp.nansum(jnp.sin(leaf)) for leaf in jax.tree.leaves(result)), result

            gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
            return contract.quick_jit(gradient)(case.params, case.xs, carry)

        bad = jax.tree.map(lambda leaf: jnp.asarray(leaf).at[1].set(jnp.nan), case.carry)
        gradients, (end, ys) = run(bad)
        expected_gradients, (_, expected_ys) = run(case.carry)
        contract.assert_close((gradients, ys), (expected_gradients, expected_ys))
        assert all(np.isnan(leaf[1]).all() for leaf in jax.tree.leaves(end))

    def test_a_number(self) -> None:
        """It stays: another one, as zero, may have no derivative there."""

        class Root(LeakyMean):
            def step(self, params: Any, carry: Any, x: jax.Array) -> tuple[Any, jax.Array]:
                mean = jnp.einsum("i,...i->...i", params["scale"], carry["mean"])
                return {"mean": mean}, jnp.sqrt(mean) + x

        cell = Root(3)
        case = jax.tree.map(lambda leaf: np.abs(leaf) + 1, contract.make_case(cell))

        def loss(params: Any) -> jax.Array:
            return seqjax.scan(cell, params, case.xs, case.carry, mask=self.MASK)[1].sum()

        assert np.isfinite(jax.grad(loss)(case.params)["scale"]).all()


class TestTracing:
    def test_eager_calls_trace_once(self) -> None:
        """Outside jit, too, only the first call of a shape runs the step in Python."""
        cell = LeakyMean(3, rate=0.3)
        case = contract.make_case(cell)
        cell.calls.clear()
        run = functools.partial(seqjax.scan, mask=contract.MASK)
        run(cell, *case[:3])
        run(cell, *case[:2])  # From zeros, which is a program of its own.
        first = len(cell.calls)
        assert first > 0
        run(cell, *case[:3])
        run(cell, case.params, 2 * case.xs, None)
        run(cell, case.params, case.xs, case.carry, mask=~contract.MASK)
        run(dataclasses.replace(cell), *case[:3])
        assert len(cell.calls) == first

    def test_eager_gradients_compile_once(self) -> None:
        """Outside jit, too, a training loop compiles nothing after its first step."""
        case = contract.make_case(MIXED, (2,), 4)

        def loss(params: Any, xs: Any) -> jax.Array:
            return (seqjax.scan(MIXED, params, xs, mask=contract.MASK[:4, :2])[1] ** 2).sum()

        compilations: list[str] = []

        def listen(event: str, duration: float, **_: Any) -> None:
            if event.endswith("backend_compile_duration"):
                compilations.append(event)

        monitoring.register_event_duration_secs_listener(listen)
        try:
            jax.grad(loss)(case.params, case.xs)
            assert compilations
            compilations.clear()
            jax.grad(loss)(case.params, 2 * case.xs)
            assert not compilations
        finally:
            monitoring.unregister_event_duration_listener(listen)

    def test_program_does_not_grow_with_the_sequence(self) -> None:
        """The step stands in the program once, or once more for the rest of an odd length."""

        def lines(steps: int) -> int:
            case = contract.abstract_case(MIXED, (2,), steps, jnp.float32)
            program = jax.make_jaxpr(functools.partial(seqjax.scan, MIXED))(*case[:3])
            return len(str(program).splitlines())

        assert lines(4000) == lines(2000)
        assert lines(4001) < 3 * lines(3)


class TestBadArguments:
    """Every message says what was got and what was expected, in jit as outside."""

    @pytest.fixture(params=["eager", "jit"])
    def scan(self, request: pytest.FixtureRequest) -> Any:
        def scan(layer: Any, params: Any, xs: Any, carry: Any = None, **options: Any) -> Any:
            if request.param == "eager":
                return seqjax.scan(layer, params, xs, carry, **options)
            arrays = {name: value for name, value in options.items() if name == "mask"}
            static = options.keys() - arrays.keys()

            def run(params: Any, xs: Any, carry: Any, arrays: Any) -> Any:
                named = {name: options[name] for name in static}
                return seqjax.scan(layer, params, xs, carry, **arrays, **named)

            return jax.jit(run)(params, xs, carry, arrays)

        return scan

    @functools.cached_property
    def case(self) -> contract.Case:
        return contract.make_case(LSTM, (4,), 3)

    def test_unknown_implementation(self, scan: Any) -> None:
        message = r"unknown implementation 'fast': expected None \(choose\) or 'scan'"
        with pytest.raises(ValueError, match=message):
            scan(LSTM, *self.case[:2], implementation="fast")

    @pytest.mark.parametrize("layer", [None, "LSTM", seqjax.LSTMCell], ids=repr)
    def test_no_layer(self, scan: Any, layer: Any) -> None:
        message = rf"layer should be a seqjax layer.*got: {type(layer).__name__}"
        with pytest.raises(TypeError, match=message):
            scan(layer, *self.case[:2])

    def test_unhashable_layer(self, scan: Any) -> None:
        class Cell(seqjax.LSTMCell):
            __hash__ = None

        message = r"layer should be hashable, got: Cell \(unhashable type: 'Cell'\)"
        with pytest.raises(TypeError, match=message):
            scan(Cell(3, 4), *self.case[:2])

    def test_inputs_without_time(self, scan: Any) -> None:
        message = r"at least 2 dimensions \(T, \*batch, features\), got shape \(3,\)"
        with pytest.raises(ValueError, match=message):
            scan(LSTM, self.case.params, self.case.xs[0, 0])

    @pytest.mark.parametrize("features", [1, 2, 4])
    def test_number_of_features(self, scan: Any, features: int) -> None:
        xs = np.zeros((3, 4, features), np.float32)
        with pytest.raises(ValueError, match=f"input_size. Expected 3, got {features}"):
            scan(LSTM, self.case.params, xs)

    @pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "uint8"])
    def test_inputs_not_floating(self, scan: Any, dtype: str) -> None:
        with pytest.raises(TypeError, match=f"xs should have a floating dtype, got: {dtype}"):
            scan(LSTM, self.case.params, self.case.xs.astype(dtype))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_inputs_and_parameters_differ_in_dtype(self, scan: Any, dtype: str) -> None:
        message = f"xs and params should have one dtype, got: {dtype} and float32"
        with pytest.raises(TypeError, match=message):
            scan(LSTM, self.case.params, self.case.xs.astype(jnp.dtype(dtype)))

    def test_one_parameter_differs_in_dtype(self, scan: Any) -> None:
        params = self.case.params._replace(b_hh=self.case.params.b_hh.astype(np.float16))
        message = "xs and params should have one dtype, got: float32 and float16"
        with pytest.raises(TypeError, match=message):
            scan(LSTM, params, self.case.xs)

    @pytest.mark.parametrize("dtype", ["int32", "float32", "uint8"])
    def test_mask_not_bool(self, scan: Any, dtype: str) -> None:
        with pytest.raises(TypeError, match=f"mask should be of dtype bool, got: {dtype}"):
            scan(LSTM, *self.case[:2], mask=np.ones((3, 4), dtype))

    @pytest.mark.parametrize("shape", [(4, 3), (3,), (3, 1), (3, 4, 1), (2, 4), ()])
    def test_mask_shape(self, scan: Any, shape: tuple[int, ...]) -> None:
        message = r"mask should have the shape of xs without features, \(3, 4\), got: \("
        with pytest.raises(ValueError, match=message):
            scan(LSTM, *self.case[:2], mask=np.ones(shape, bool))

    @pytest.mark.parametrize(
        "carry",
        [np.zeros((4, 5), np.float32), (np.zeros((4, 5), np.float32),) * 2, {}, ()],
        ids=["array", "tuple", "dict", "empty"],
    )
    def test_carry_structure(self, scan: Any, carry: Any) -> None:
        with pytest.raises(TypeError, match=r"carry should have the structure .*LSTMCarry.*, got"):
            scan(LSTM, *self.case[:2], carry)

    @pytest.mark.parametrize("shape", [(5,), (1, 5), (4, 1), (3, 5), (4, 6)])
    @pytest.mark.parametrize("field", ["h", "c"])
    def test_carry_shape(self, scan: Any, field: str, shape: tuple[int, ...]) -> None:
        carry = self.case.carry._replace(**{field: np.zeros(shape, np.float32)})
        message = rf"carry\.{field}: expected shape \(4, 5\), got \({shape[0]},"
        with pytest.raises(ValueError, match=message):
            scan(LSTM, *self.case[:2], carry)

    @pytest.mark.parametrize("field", ["h", "c"])
    def test_carry_dtype(self, scan: Any, field: str) -> None:
        wrong = getattr(self.case.carry, field).astype(np.float16)
        with pytest.raises(
            TypeError, match=rf"carry\.{field}: expected dtype float32, got float16"
        ):
            scan(LSTM, *self.case[:2], self.case.carry._replace(**{field: wrong}))

    def test_carry_with_c_in_16_bit(self, scan: Any) -> None:
        case = contract.make_case(LSTM, (4,), 3, jnp.bfloat16)
        carry = case.carry._replace(c=case.carry.c.astype(jnp.bfloat16))
        with pytest.raises(TypeError, match=r"carry\.c: expected dtype float32, got bfloat16"):
            scan(LSTM, *case[:2], carry)

    def test_carry_of_a_nested_layer_is_named(self, scan: Any) -> None:
        case = contract.make_case(MIXED, (4,), 3)
        bad = case.carry[0]._replace(backward=np.zeros((4, 9), np.float32))
        message = r"carry\[0\]\.backward: expected shape \(4, 3\), got \(4, 9\)"
        with pytest.raises(ValueError, match=message):
            scan(MIXED, *case[:2], (bad, case.carry[1]))
