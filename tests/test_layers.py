"""Stack and Bidirectional: what they compute, their dropout, states and arguments."""

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

import seqjax

LSTM = seqjax.LSTMCell(3, 5)
GRU = seqjax.GRUCell(5, 4)
DEEP = seqjax.Stack(
    [
        seqjax.Bidirectional(
            seqjax.Stack([seqjax.GRUCell(3, 4), seqjax.LSTMCell(4, 5, proj_size=2)]),
            seqjax.RNNCell(3, 3, nonlinearity="relu"),
        ),
        seqjax.Stack([seqjax.GRUCell(5, 4)]),
    ]
)
"""Layers in layers in layers."""


COMPOSED = sorted(cases.LAYERS.keys() - cases.CELLS.keys())


class TestEquations:
    @pytest.mark.parametrize(
        "layer",
        [*(cases.LAYERS[name] for name in COMPOSED), DEEP],
        ids=[*COMPOSED, "deep"],
    )
    def test_masked(self, layer: seqjax.Layer, x64: None) -> None:
        """Against a loop over rows, layers and steps that only ever sees valid steps."""
        case = contract.make_case(layer, dtype=np.float64)
        run = contract.quick_jit(functools.partial(seqjax.scan, layer))
        got = jax.device_get(run(*case[:3], mask=contract.MASK))
        expected = numpy_reference.run(layer, *case[:3], contract.MASK)
        contract.assert_close(got, expected, 1e-12)


class TestStack:
    def test_sizes(self) -> None:
        stack = seqjax.Stack([LSTM, GRU])
        assert (stack.input_size, stack.output_size) == (3, 4)

    def test_one_layer_is_that_layer(self) -> None:
        case = contract.make_case(LSTM)
        (carry,), ys = seqjax.scan(
            seqjax.Stack([LSTM]), (case.params,), case.xs, (case.carry,), mask=contract.MASK
        )
        expected = seqjax.scan(LSTM, case.params, case.xs, case.carry, mask=contract.MASK)
        contract.assert_close((carry, ys), expected)

    def test_layers_may_be_any_sequence(self) -> None:
        assert seqjax.Stack(iter([LSTM, GRU])) == seqjax.Stack((LSTM, GRU))

    def test_layers_draw_different_weights(self) -> None:
        same = seqjax.GRUCell(4, 4)
        first, second = seqjax.Stack([same, same]).init(jax.random.key(0))
        for one, other in zip(first, second, strict=True):
            assert not np.any(one == other)

    def test_differing_dropout_is_another_layer(self) -> None:
        assert seqjax.Stack([LSTM, GRU], dropout=0.5) != seqjax.Stack([LSTM, GRU])
        assert seqjax.Stack([LSTM, GRU], dropout=1) == seqjax.Stack([LSTM, GRU], dropout=1.0)

    def test_no_layers(self) -> None:
        with pytest.raises(ValueError, match="at least one layer, got none"):
            seqjax.Stack([])

    def test_sizes_that_do_not_chain(self) -> None:
        message = r"layers\[1\] has output_size 4, but layers\[2\] expects input_size 3"
        with pytest.raises(ValueError, match=message):
            seqjax.Stack([LSTM, GRU, LSTM])

    @pytest.mark.parametrize("entry", [None, "GRU", seqjax.GRUCell], ids=repr)
    def test_entry_no_layer(self, entry: Any) -> None:
        message = rf"layers\[1\] should be a seqjax layer.*got: {type(entry).__name__}"
        with pytest.raises(TypeError, match=message):
            seqjax.Stack([LSTM, entry])

    def test_cell_instead_of_a_sequence(self) -> None:
        with pytest.raises(TypeError, match="LSTMCell"):
            seqjax.Stack(LSTM)  # type: ignore[arg-type]

    @pytest.mark.parametrize("dropout", [-0.1, 1.1, float("nan"), True, "0.5", None], ids=repr)
    def test_bad_dropout(self, dropout: Any) -> None:
        with pytest.raises(ValueError, match=rf"number in range \[0, 1\].*got: {dropout!r}"):
            seqjax.Stack([LSTM, GRU], dropout=dropout)

    @pytest.mark.parametrize("dropout", [0, 1, 0.5, np.float32(0.25)], ids=repr)
    def test_good_dropout(self, dropout: Any) -> None:
        assert seqjax.Stack([LSTM, GRU], dropout=dropout).dropout == float(dropout)


class TestBidirectional:
    LAYER = seqjax.Bidirectional(seqjax.LSTMCell(3, 5), seqjax.GRUCell(3, 4))

    def test_sizes(self) -> None:
        assert (self.LAYER.input_size, self.LAYER.output_size) == (3, 9)

    def test_outputs_are_forward_then_backward(self) -> None:
        case = contract.make_case(self.LAYER)
        carry, ys = seqjax.scan(self.LAYER, *case[:3], mask=contract.MASK)
        for direction, layer, columns, reverse in (
            ("forward", self.LAYER.forward, np.s_[:5], False),
            ("backward", self.LAYER.backward, np.s_[5:], True),
        ):
            expected = seqjax.scan(
                layer,
                getattr(case.params, direction),
                case.xs,
                getattr(case.carry, direction),
                mask=contract.MASK,
                reverse=reverse,
            )
            contract.assert_close((getattr(carry, direction), ys[..., columns]), expected)

    def test_backward_state_is_its_output_at_the_first_valid_step(self) -> None:
        case = contract.make_case(self.LAYER)
        carry, ys = seqjax.scan(self.LAYER, *case[:3], mask=contract.MASK)
        first = contract.MASK.argmax(axis=0)
        for row in range(contract.ROWS):
            if contract.MASK[:, row].any():
                np.testing.assert_array_equal(carry.backward[row], ys[first[row], row, 5:])

    def test_directions_draw_different_weights(self) -> None:
        cell = seqjax.GRUCell(3, 4)
        params = seqjax.Bidirectional(cell, cell).init(jax.random.key(0))
        for one, other in zip(params.forward, params.backward, strict=True):
            assert not np.any(one == other)

    def test_differing_input_sizes(self) -> None:
        with pytest.raises(ValueError, match="input_size differs: got 3 and 5"):
            seqjax.Bidirectional(LSTM, GRU)

    def test_no_layer(self) -> None:
        with pytest.raises(TypeError, match=r"forward should be a seqjax layer.*got: NoneType"):
            seqjax.Bidirectional(None, LSTM)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"backward should be a seqjax layer.*got: str"):
            seqjax.Bidirectional(LSTM, "LSTM")  # type: ignore[arg-type]

    def test_no_step_inside_a_stack_either(self) -> None:
        contract.check_no_step_says_why(DEEP)


@dataclasses.dataclass(frozen=True)
class PassThrough(seqjax.Cell):
    """Gives its input back and counts steps: what dropout did is then seen in the output."""

    input_size: int = 64

    @property
    def output_size(self) -> int:
        return self.input_size

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
        return {"scale": jnp.ones((), dtype)}

    def initial_carry(self, batch_shape: tuple[int, ...] = (), dtype: Any = jnp.float32) -> Any:
        return jnp.zeros((*batch_shape, 1), dtype)

    def step(self, params: Any, carry: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        return carry + 1, params["scale"] * x


@functools.partial(contract.quick_jit, static_argnums=0)
def run_with_key(layer: seqjax.Layer, params: Any, xs: Any, mask: Any, key: Any) -> Any:
    return seqjax.scan(layer, params, xs, mask=mask, key=key)


class TestDropout:
    SHAPE = (8, 4, 64)

    def run(self, rate: float, key: jax.Array | None, layers: int = 2, **options: Any) -> Any:
        """Ones through layers that change nothing but for the dropout between them."""
        stack = seqjax.Stack([PassThrough()] * layers, dropout=rate)
        return self.run_layer(stack, key, **options)

    def run_layer(self, layer: seqjax.Layer, key: Any, xs: Any = None, mask: Any = None) -> Any:
        xs = np.ones(self.SHAPE, np.float32) if xs is None else xs
        return run_with_key(layer, layer.init(jax.random.key(9)), xs, mask, key)

    def test_no_key_no_dropout(self) -> None:
        _, ys = self.run(0.5, None)
        np.testing.assert_array_equal(ys, 1)

    def test_elements_are_zero_or_scaled_up(self) -> None:
        _, ys = self.run(0.2, jax.random.key(0))
        np.testing.assert_allclose(np.unique(ys), [0, 1 / 0.8], rtol=1e-6)
        # 2048 draws: three standard deviations are 0.027.
        assert abs(float((ys == 0).mean()) - 0.2) < 0.027

    def test_every_element_is_drawn_for_itself(self) -> None:
        _, ys = self.run(0.5, jax.random.key(0))
        dropped = np.asarray(ys == 0)
        for axis, name in enumerate(("step", "row", "feature")):
            patterns = np.unique(
                np.moveaxis(dropped, axis, 0).reshape(dropped.shape[axis], -1), axis=0
            )
            assert len(patterns) == dropped.shape[axis], f"two {name}s share a pattern"

    def test_a_key_gives_one_pattern(self) -> None:
        first, again, other = (self.run(0.5, jax.random.key(seed))[1] for seed in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert 0.4 < float((first == other).mean()) < 0.6

    def test_between_layers_only(self) -> None:
        """One layer: neither input nor output is dropped. n layers: n - 1 times."""
        _, ys = self.run(0.5, jax.random.key(0), layers=1)
        np.testing.assert_array_equal(ys, 1)
        _, ys = self.run(0.5, jax.random.key(0), layers=4)
        np.testing.assert_array_equal(np.unique(ys), [0, 8])
        assert abs(float((ys == 8).mean()) - 1 / 8) < 0.022

    def test_layers_are_dropped_independently(self) -> None:
        """With one pattern for both gaps, half of the elements would be left."""
        _, ys = self.run(0.5, jax.random.key(0), layers=3)
        assert abs(float((ys != 0).mean()) - 1 / 4) < 0.03

    def test_nested_stacks_draw_independently(self) -> None:
        inner = seqjax.Stack([PassThrough(), PassThrough()], dropout=0.5)
        outer = seqjax.Stack([inner, inner])
        assert outer.draws_dropout
        _, ys = self.run_layer(outer, jax.random.key(0))
        assert abs(float((ys == 4).mean()) - 1 / 4) < 0.03

    def test_directions_draw_independently(self) -> None:
        one = seqjax.Stack([PassThrough(), PassThrough()], dropout=0.5)
        both = seqjax.Bidirectional(one, one)
        assert both.draws_dropout
        _, ys = self.run_layer(both, jax.random.key(0))
        assert 0.4 < float((ys[..., :64] == ys[..., 64:]).mean()) < 0.6

    def test_states_are_not_dropped(self) -> None:
        carry, _ = self.run(0.5, jax.random.key(0))
        np.testing.assert_array_equal(carry, np.full((2, 4, 1), 8))

    def test_padding_stays_zero(self) -> None:
        mask = np.arange(8)[:, None] < np.array([8, 3, 0, 5])
        _, ys = self.run(0.5, jax.random.key(0), mask=mask)
        contract.assert_zero(ys[~mask])
        np.testing.assert_array_equal(np.unique(ys[mask]), [0, 2])

    def test_rate_zero_changes_nothing(self) -> None:
        _, ys = self.run(0.0, jax.random.key(0))
        np.testing.assert_array_equal(ys, 1)

    def test_rate_one_gives_exact_zeros_and_finite_gradients(self) -> None:
        stack = seqjax.Stack([seqjax.LSTMCell(3, 5), seqjax.GRUCell(5, 4)], dropout=1.0)
        case = contract.make_case(stack)

        @contract.quick_jit
        def run(params: Any, xs: Any) -> Any:
            def loss(params: Any, xs: Any) -> Any:
                _, ys = seqjax.scan(stack, params, xs, case.carry, key=jax.random.key(0))
                return ys.sum(), ys

            return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, xs)

        (params_grad, xs_grad), ys = run(case.params, case.xs)
        expected = seqjax.scan(
            stack.layers[1], case.params[1], np.zeros((*case.xs.shape[:-1], 5), np.float32),
            case.carry[1],
        )[1]  # fmt: skip
        contract.assert_close(ys, expected)
        contract.assert_zero(xs_grad)
        jax.tree.map(contract.assert_zero, params_grad[0])
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params_grad))
        assert np.any(params_grad[1].w_hh != 0)

    def test_gradient_is_dropped_alike(self) -> None:
        """What is dropped on the way forward passes no gradient; the rest passes it scaled."""
        stack = seqjax.Stack([PassThrough()] * 2, dropout=0.2)
        params = stack.init(jax.random.key(9))

        @contract.quick_jit
        def total(xs: jax.Array) -> Any:
            def loss(xs: jax.Array) -> Any:
                _, ys = seqjax.scan(stack, params, xs, key=jax.random.key(0))
                return ys.sum(), ys

            return jax.grad(loss, has_aux=True)(xs)

        gradient, ys = total(np.ones(self.SHAPE, np.float32))
        np.testing.assert_array_equal(gradient, ys)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_dtype_is_kept(self, dtype: str) -> None:
        stack = cases.LAYERS["stack"]
        case = contract.abstract_case(stack, (2,), 3, jnp.dtype(dtype))
        run = functools.partial(seqjax.scan, stack, key=jax.random.key(0))
        carry, ys = jax.eval_shape(run, *case[:3])
        assert ys.dtype == dtype
        assert jax.tree.map(lambda leaf: leaf.dtype, carry) == jax.tree.map(
            lambda leaf: leaf.dtype, case.carry
        )

    def test_traced_keys_under_vmap(self) -> None:
        """One key a row: as if each row were run by itself."""
        keys = jax.random.split(jax.random.key(0), 3)
        xs = np.ones((8, 64), np.float32)
        stack = seqjax.Stack([PassThrough()] * 2, dropout=0.5)
        params = stack.init(jax.random.key(9))
        run = functools.partial(seqjax.scan, stack, params, xs)
        _, ys = contract.quick_jit(jax.vmap(lambda key: run(key=key)))(keys)
        for key, row in zip(keys, ys, strict=True):
            np.testing.assert_array_equal(row, self.run(0.5, key, xs=xs)[1])

    def test_old_style_keys(self) -> None:
        _, new = self.run(0.5, jax.random.key(0))
        _, old = self.run(0.5, jax.random.PRNGKey(0))
        np.testing.assert_array_equal(old, new)

    def test_draws_dropout(self) -> None:
        assert cases.LAYERS["stack"].draws_dropout
        assert not seqjax.Stack([LSTM, GRU]).draws_dropout
        assert not seqjax.Stack([LSTM], dropout=0.5).draws_dropout
        assert not any(cell.draws_dropout for cell in cases.CELLS.values())

    @pytest.mark.parametrize("name", cases.LAYERS)
    def test_draws_only_where_it_says_so(self, name: str) -> None:
        layer = cases.LAYERS[name]
        case = contract.abstract_case(layer, (2,), 3, jnp.float32)
        run = functools.partial(seqjax.scan, layer)
        with_key = jax.make_jaxpr(lambda key, *args: run(*args, key=key))
        assert "random_bits" not in str(jax.make_jaxpr(run)(*case[:3]))
        drawn = "random_bits" in str(with_key(jax.random.key(0), *case[:3]))
        assert drawn == layer.draws_dropout
