"""What a layer is given is what it takes, or an error says what was got and what is expected.

The doors are `scan`, `step`, what decodes by steps, and the modules; inside of `jax.jit`, too.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import cases
import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shells
from flax import linen as nn
from flax import nnx
from jax import export
from jax.sharding import PartitionSpec as P
from user_cells import CELLS as USER_CELLS

import seqjax
import seqjax.linen
from seqjax.ops.dispatch import IMPLEMENTATIONS
from seqjax.parameter_names import params_to_dict

GRU = cases.CELLS["gru"]
STACK = cases.STEPPING["stack"]
BOTH = cases.LAYERS["stack_bidirectional"]

Door = Callable[..., Any]


def scan(layer: seqjax.Layer, params: Any, carry: Any, x: Any) -> Any:
    return seqjax.scan(layer, params, jnp.asarray(x)[None], carry)


def step(layer: seqjax.Layer, params: Any, carry: Any, x: Any) -> Any:
    return layer.step(params, carry, x)


def jitted_step(layer: seqjax.Layer, params: Any, carry: Any, x: Any) -> Any:
    return jax.jit(layer.step)(params, carry, x)


def generate(layer: seqjax.Layer, params: Any, carry: Any, x: Any) -> Any:
    """The input for each of two rows' tokens."""
    return seqjax.generate(
        lambda carry, token: layer.step(params, carry, x),
        carry, [[0, 0]], max_tokens=1, temperature=0.0, carry_axis=0,
    )  # fmt: skip


def beam_search(layer: seqjax.Layer, params: Any, carry: Any, x: Any) -> Any:
    def step(carry: Any, token: jax.Array) -> Any:
        return layer.step(params, carry, x[: len(token)])

    return seqjax.beam_search(step, carry, [[0, 0]], max_tokens=1, num_beams=1, carry_axis=0)


DOORS = [scan, step, jitted_step, generate, beam_search]
each_door = pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
scan_and_step = pytest.mark.parametrize("door", [scan, step], ids=lambda door: door.__name__)


def arguments(layer: seqjax.Layer, rows: int = 2) -> tuple[Any, Any, Any]:
    """Parameters, carry and one input for every row: random."""
    x = cases.random_inputs((rows, layer.input_size))
    return cases.random_params(layer), cases.random_carry(layer, (rows,)), x


def stack_of(count: int) -> seqjax.Stack:
    return seqjax.Stack([seqjax.GRUCell(3, 3)] * count)


class TestParams:
    """Other arrays than the layer's."""

    @each_door
    @pytest.mark.parametrize(
        ("layers", "given", "difference"),
        [(2, 3, "unexpected layers_2/w_ih, "), (3, 2, "missing layers_2/w_ih, ")],
    )
    def test_another_number_of_layers(
        self, door: Door, layers: int, given: int, difference: str
    ) -> None:
        _, carry, x = arguments(stack_of(layers))
        params = cases.random_params(stack_of(given))
        message = (
            f"params should be those of the Stack, as layer.init gives them, got: {difference}"
        )
        with pytest.raises(TypeError, match=message):
            door(stack_of(layers), params, carry, x)

    @each_door
    @pytest.mark.parametrize("name", ["gru", "lstm_proj", "rnn_tanh", "mgu"])
    @pytest.mark.parametrize("left_out", ["b_ih", "b_hh"])
    def test_one_bias_alone(self, door: Door, name: str, left_out: str) -> None:
        layer = (cases.CELLS | USER_CELLS)[name]
        params, carry, x = arguments(layer)
        with pytest.raises(TypeError, match=f"(?m)got: missing {left_out}$"):
            door(layer, params._replace(**{left_out: None}), carry, x)

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    @pytest.mark.parametrize("left_out", ["b_ih", "b_hh"])
    def test_one_bias_alone_in_every_implementation(
        self, implementation: str, left_out: str
    ) -> None:
        params, _, x = arguments(GRU)
        with pytest.raises(TypeError, match=f"(?m)got: missing {left_out}$"):
            seqjax.scan(
                GRU, params._replace(**{left_out: None}), x[None], implementation=implementation
            )

    @each_door
    def test_biases_of_a_layer_without(self, door: Door) -> None:
        layer = dataclasses.replace(GRU, bias=False)
        with pytest.raises(TypeError, match=r"(?m)got: unexpected b_ih, b_hh$"):
            door(layer, *arguments(GRU))

    @each_door
    @pytest.mark.parametrize("shape", [(1,), (15, 1), (1, 15), (14,), ()])
    def test_shape_of_a_bias(self, door: Door, shape: tuple[int, ...]) -> None:
        params, carry, x = arguments(GRU)
        message = rf"params b_hh: expected shape \(15,\), got {re.escape(str(shape))}"
        with pytest.raises(ValueError, match=message):
            door(GRU, params._replace(b_hh=jnp.ones(shape)), carry, x)

    @scan_and_step
    @pytest.mark.parametrize(
        ("other", "got"),
        [
            (seqjax.GRUCell(3, 6), (3, 18)),
            (seqjax.GRUCell(4, 5), (4, 15)),
            (seqjax.RNNCell(3, 5), (3, 5)),
            (seqjax.LSTMCell(3, 5), (3, 20)),
        ],
    )
    def test_another_cells(self, door: Door, other: seqjax.Cell, got: tuple[int, ...]) -> None:
        _, carry, x = arguments(GRU)
        message = rf"params w_ih: expected shape \(3, 15\), got {re.escape(str(got))}"
        with pytest.raises(ValueError, match=message):
            door(GRU, cases.random_params(other), carry, x)

    @scan_and_step
    def test_an_axis_too_many(self, door: Door) -> None:
        """As of an ensemble, which `jax.vmap` takes apart."""
        params, carry, x = arguments(GRU)
        stacked = jax.tree.map(lambda leaf: leaf[None], params)
        with pytest.raises(ValueError, match=r"params w_ih: expected shape.*got \(1, 3, 15\)"):
            door(GRU, stacked, carry, x)

    def test_deep_inside(self) -> None:
        params, carry, x = arguments(BOTH)
        backward = params[1].backward._replace(w_hh=jnp.ones((4, 13)))
        wrong = params[0], params[1]._replace(backward=backward)
        message = r"params layers_1/backward/w_hh: expected shape \(4, 12\), got \(4, 13\)"
        with pytest.raises(ValueError, match=message):
            scan(BOTH, wrong, carry, x)

    @scan_and_step
    @pytest.mark.parametrize(
        ("params", "got"),
        [
            (None, "missing w_ih, w_hh, b_ih, b_hh$"),
            ({}, "missing w_ih, w_hh, b_ih, b_hh$"),
            (np.ones((3, 15), np.float32), "; unexpected a lone array$"),
            ((np.ones((3, 15), np.float32),), "; unexpected layers_0$"),
        ],
        ids=["none", "empty", "array", "tuple"],
    )
    def test_something_else(self, door: Door, params: Any, got: str) -> None:
        _, carry, x = arguments(GRU)
        with pytest.raises(TypeError, match=f"got: .*{got}"):
            door(GRU, params, carry, x)

    @scan_and_step
    @pytest.mark.parametrize("leaf", ["weights.npy", 0.5], ids=repr)
    def test_no_array(self, door: Door, leaf: Any) -> None:
        params, carry, x = arguments(GRU)
        message = f"params b_ih: expected an array, got: {type(leaf).__name__}"
        with pytest.raises(TypeError, match=message):
            door(GRU, params._replace(b_ih=leaf), carry, x)

    @each_door
    def test_dtype(self, door: Door) -> None:
        params, carry, x = arguments(GRU)
        params = params._replace(w_hh=params.w_hh.astype(jnp.bfloat16))
        message = r"xs? and params should have one dtype, got: float32 and bfloat16"
        with pytest.raises(TypeError, match=message):
            door(GRU, params, carry, x)


def as_restored(tree: Any) -> Any:
    """Dicts for NamedTuples, and lists for tuples: what Orbax restores without a target."""
    if hasattr(tree, "_asdict"):
        return {name: as_restored(value) for name, value in tree._asdict().items()}
    return [as_restored(value) for value in tree] if isinstance(tree, tuple) else tree


class TestNames:
    """The right arrays in other containers."""

    @scan_and_step
    @pytest.mark.parametrize("name", ["lstm_proj", "gru_no_bias", "stack"])
    @pytest.mark.parametrize("change", [params_to_dict, as_restored])
    def test_values_and_gradients(self, door: Door, name: str, change: Any) -> None:
        layer = cases.STEPPING[name]
        params, carry, x = arguments(layer)

        @functools.partial(contract.quick_jit)
        def value_and_grad(params: Any) -> Any:
            def loss(params: Any) -> Any:
                _, y = door(layer, params, carry, x)
                return jnp.sin(y).sum(), y

            return jax.value_and_grad(loss, has_aux=True)(params)

        (_, y), gradient = value_and_grad(change(params))
        (_, expected_y), expected = value_and_grad(params)
        contract.assert_close(y, expected_y)
        contract.assert_close(gradient, change(expected))  # In the structure that was given.

    def test_both_directions(self) -> None:
        params, carry, x = arguments(BOTH)
        expected = scan(BOTH, params, carry, x)
        contract.assert_close(scan(BOTH, as_restored(params), carry, x), expected)
        contract.assert_close(scan(BOTH, params_to_dict(params), carry, x), expected)

    def test_the_order_of_a_dict_does_not_count(self) -> None:
        stack = stack_of(12)
        params, carry, x = arguments(stack)
        shuffled = dict(sorted(params_to_dict(params).items(), reverse=True))
        contract.assert_close(step(stack, shuffled, carry, x), step(stack, params, carry, x))

    def test_restored_by_orbax(self, tmp_path: Any) -> None:
        checkpoint = pytest.importorskip("orbax.checkpoint")
        params, carry, x = arguments(BOTH)
        with checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "params", params)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "params")
        contract.assert_close(scan(BOTH, restored, carry, x), scan(BOTH, params, carry, x))

    @scan_and_step
    def test_wrong_names(self, door: Door) -> None:
        params, carry, x = arguments(GRU)
        renamed = {name.upper(): leaf for name, leaf in params._asdict().items()}
        message = "missing w_ih, w_hh, b_ih, b_hh; unexpected B_HH, B_IH, W_HH, W_IH$"
        with pytest.raises(TypeError, match=message):
            door(GRU, renamed, carry, x)

    @scan_and_step
    def test_wrong_shape(self, door: Door) -> None:
        params, carry, x = arguments(STACK)
        wrong = params_to_dict(params)
        wrong["layers_1"]["w_hh"] = wrong["layers_1"]["w_hh"].T
        message = r"params layers_1/w_hh: expected shape \(6, 18\), got \(18, 6\)"
        with pytest.raises(ValueError, match=message):
            door(STACK, wrong, carry, x)


class TestStep:
    """Inputs and states that `scan` refuses."""

    @pytest.mark.parametrize("layer", [GRU, STACK, USER_CELLS["coupled"]], ids=repr)
    @pytest.mark.parametrize("dtype", ["int32", "bool", "uint8", "complex64"])
    def test_inputs_not_floating(self, layer: seqjax.Layer, dtype: str) -> None:
        params, carry, x = arguments(layer)
        with pytest.raises(TypeError, match=f"x should have a floating dtype, got: {dtype}"):
            layer.step(params, carry, x.astype(dtype))

    def test_one_hots_of_integers(self) -> None:
        params, carry, _ = arguments(GRU)

        def step(carry: Any, token: jax.Array) -> Any:
            return GRU.step(params, carry, jax.nn.one_hot(token, 3, dtype=int))

        with pytest.raises(TypeError, match="x should have a floating dtype, got: int32"):
            seqjax.generate(step, carry, [[0, 1]], max_tokens=2, temperature=0.0)

    @pytest.mark.parametrize("layer", [GRU, STACK, USER_CELLS["coupled"]], ids=repr)
    def test_inputs_of_another_dtype(self, layer: seqjax.Layer) -> None:
        params, carry, x = arguments(layer)
        message = "x and params should have one dtype, got: bfloat16 and float32"
        with pytest.raises(TypeError, match=message):
            layer.step(params, carry, x.astype(jnp.bfloat16))

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((), r"x should have at least 1 dimension \(\*batch, features\), got shape \(\)"),
            ((2, 4), r"x.shape\[-1\] must be equal to input_size. Expected 3, got 4"),
            ((2, 1), r"x.shape\[-1\] must be equal to input_size. Expected 3, got 1"),
            ((7, 2, 3), r"carry: expected shape \(7, 2, 5\), got \(2, 5\)"),
            ((3,), r"carry: expected shape \(5,\), got \(2, 5\)"),
        ],
    )
    def test_shape_of_inputs(self, shape: tuple[int, ...], message: str) -> None:
        params, carry, _ = arguments(GRU)
        with pytest.raises(ValueError, match=message):
            GRU.step(params, carry, jnp.ones(shape))

    @pytest.mark.parametrize("shape", [(1, 5), (5,), (2, 1), (3, 5), (1, 2, 5)])
    def test_shape_of_carry(self, shape: tuple[int, ...]) -> None:
        params, carry, x = arguments(STACK)
        wrong = carry[0]._replace(c=jnp.ones(shape)), *carry[1:]
        message = rf"carry\[0\]\.c: expected shape \(2, 5\), got {re.escape(str(shape))}"
        with pytest.raises(ValueError, match=message):
            STACK.step(params, wrong, x)

    def test_dtype_of_carry(self) -> None:
        """c is kept in float32, and stays so."""
        lstm = cases.CELLS["lstm"]
        params, carry, x = jax.tree.map(lambda a: a.astype(jnp.bfloat16), arguments(lstm))
        with pytest.raises(TypeError, match=r"carry\.c: expected dtype float32, got bfloat16"):
            lstm.step(params, carry, x)
        new, y = lstm.step(params, carry._replace(c=carry.c.astype(jnp.float32)), x)
        assert (new.h.dtype, new.c.dtype, y.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)

    @pytest.mark.parametrize("carry", [None, (), {"h": jnp.ones((2, 5))}, [jnp.ones((2, 5))]])
    def test_structure_of_carry(self, carry: Any) -> None:
        params, _, x = arguments(GRU)
        message = r"carry should have the structure PyTreeDef\(\*\), got: .* makes one"
        with pytest.raises(TypeError, match=message):
            GRU.step(params, carry, x)

    def test_lists_and_numpy_arrays(self) -> None:
        """As `scan` takes them."""
        params, carry, x = arguments(GRU)
        expected = GRU.step(params, carry, x)
        numpy = jax.tree.map(np.asarray, (params, carry))
        contract.assert_close(GRU.step(*numpy, x.tolist()), expected)


@dataclasses.dataclass(frozen=True)
class Decay(seqjax.Cell):
    """A cell as a user writes one; its `step` checks nothing."""

    input_size: int = 3

    @property
    def output_size(self) -> int:
        return self.input_size

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> Any:
        return {"rate": jax.random.uniform(key, (self.input_size,), dtype)}

    def initial_carry(self, batch_shape: tuple[int, ...] = (), dtype: Any = jnp.float32) -> Any:
        return jnp.zeros((*batch_shape, self.input_size), dtype)

    def step(self, params: Any, carry: Any, x: jax.Array, gain: float = 1.0) -> Any:
        """Decays."""
        carry = jnp.einsum("i,...i->...i", params["rate"], carry) + gain * x
        return carry, carry


class FromElsewhere(Decay):
    """A cell whose parameters `init` does not draw."""

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> Any:
        raise NotImplementedError


class NeedsNumbers(Decay):
    """A cell whose `init` cannot be traced."""

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> Any:
        seed = int(jax.random.randint(key, (), 0, 9))
        return {"rate": np.random.default_rng(seed).random(self.input_size, np.float32)}


class StateFromElsewhere(Decay):
    """A cell that starts from what an encoder gives."""

    def initial_carry(self, batch_shape: tuple[int, ...] = (), dtype: Any = jnp.float32) -> Any:
        raise NotImplementedError("give a carry")


class NoDefaultDtype(Decay):
    """A cell whose `init` is called in another way."""

    def init(self, key: jax.Array, dtype: Any) -> Any:  # type: ignore[override]
        return super().init(key, dtype)


class TestCellsOfOnesOwn:
    @scan_and_step
    def test_what_its_step_need_not_check(self, door: Door) -> None:
        params, carry, x = arguments(Decay())
        with pytest.raises(ValueError, match=r"params rate: expected shape \(3,\), got \(1,\)"):
            door(Decay(), {"rate": jnp.ones(1)}, carry, x)
        with pytest.raises(TypeError, match="got: unexpected extra"):
            door(Decay(), params | {"extra": jnp.ones(3)}, carry, x)
        with pytest.raises(ValueError, match=r"carry: expected shape \(2, 3\), got \(1, 3\)"):
            door(Decay(), params, carry[:1], x)
        with pytest.raises(TypeError, match="floating dtype, got: int32"):
            door(Decay(), params, carry, x.astype(int))

    @scan_and_step
    @pytest.mark.parametrize("cell", [FromElsewhere(), NeedsNumbers(), NoDefaultDtype()], ids=repr)
    def test_init_that_does_not_say(self, door: Door, cell: seqjax.Cell) -> None:
        """Whatever it is given is right, in a stack, too."""
        params, carry, x = arguments(Decay())
        expected = door(Decay(), params, carry, x)
        contract.assert_close(door(cell, params | {"more": jnp.ones(7)}, carry, x), expected)
        stack = seqjax.Stack([cell])
        _, y = door(stack, (params,), (carry,), x)
        contract.assert_close(y, expected[1])
        with pytest.raises((TypeError, ValueError), match=r"zip|unexpected layers_1"):
            door(stack, (params, params), (carry,), x)

    @scan_and_step
    def test_initial_carry_that_does_not_say(self, door: Door) -> None:
        params, carry, x = arguments(Decay())
        expected = door(Decay(), params, carry, x)
        contract.assert_close(door(StateFromElsewhere(), params, carry, x), expected)
        with pytest.raises(NotImplementedError, match="give a carry"):
            seqjax.scan(StateFromElsewhere(), params, x[None])

    @scan_and_step
    def test_no_hash(self, door: Door) -> None:
        class Cell(Decay):
            __hash__ = None  # type: ignore[assignment]

        with pytest.raises(TypeError, match="layer should be hashable, got: Cell"):
            door(Cell(), *arguments(Decay()))

    def test_step_of_a_base(self) -> None:
        """It gets what the derived class makes of its own arguments."""

        class Scaled(seqjax.GRUCell):
            def init(self, key: jax.Array, dtype: Any = jnp.float32) -> Any:
                return {"cell": super().init(key, dtype), "scale": jnp.ones((), dtype)}

            def step(self, params: Any, carry: Any, x: jax.Array, times: int = 1) -> Any:
                return super().step(params["cell"], carry, times * params["scale"] * x)

        params, carry, x = arguments(GRU)
        scaled = Scaled(GRU.input_size, GRU.hidden_size)
        own = {"cell": params, "scale": jnp.float32(2)}
        contract.assert_close(scaled.step(own, carry, x, 3), GRU.step(params, carry, 6 * x))
        _, ys = seqjax.scan(scaled, own, x[None], carry)
        contract.assert_close(ys[0], GRU.step(params, carry, 2 * x)[1])
        with pytest.raises(TypeError, match=r"those of the Scaled.* missing cell/w_ih"):
            scaled.step(params, carry, x)

    def test_what_else_its_step_takes(self) -> None:
        params, carry, x = arguments(Decay())
        new, _ = Decay().step(params, carry, x=x, gain=2.0)
        np.testing.assert_allclose(new, params["rate"][None] * carry + 2 * x, rtol=1e-6)

    @scan_and_step
    def test_asked_once(self, door: Door) -> None:
        """Outside `jax.jit`, to ask at every call would take longer than a small layer."""
        asked = []

        class Cell(Decay):
            def init(self, *args: Any) -> Any:
                asked.append("init")
                return super().init(*args)

            def initial_carry(self, *args: Any) -> Any:
                asked.append("initial_carry")
                return super().initial_carry(*args)

        params, carry, x = arguments(Decay())
        door(Cell(), params, carry, x)
        assert sorted(asked) == ["init", "initial_carry"]
        door(Cell(), params, carry, x + 1)
        assert len(asked) == 2

    def test_step_is_the_one_that_was_written(self) -> None:
        assert Decay.step.__doc__ == "Decays."
        assert Decay.step.__name__ == "step"
        assert FromElsewhere.step is Decay.step

    def test_a_named_tuple_from_a_dict(self) -> None:
        """In `step`, too, the cell sees its own structure."""
        cell = USER_CELLS["mgu"]
        seen = []

        class Spy(type(cell)):  # type: ignore[misc]
            def step(self, params: Any, carry: Any, x: jax.Array) -> Any:
                seen.append(type(params))
                return super().step(params, carry, x)

        params, carry, x = arguments(cell)
        Spy(3, 5).step(params._asdict(), carry, x)
        assert seen == [seqjax.GatedParams]

    def test_containers_that_the_cell_finds_are_left_alone(self) -> None:
        """They may hold more than arrays."""

        @functools.partial(
            jax.tree_util.register_dataclass, data_fields=["rate"], meta_fields=["note"]
        )
        @dataclasses.dataclass
        class Noted:
            rate: jax.Array
            note: str = "drawn"

            def __getitem__(self, name: str) -> jax.Array:
                return getattr(self, name) * (2 if self.note == "doubled" else 1)

        class Cell(Decay):
            def init(self, key: jax.Array, dtype: Any = jnp.float32) -> Any:
                return Noted(jnp.ones(self.input_size, dtype))

        params, carry, x = arguments(Decay())
        expected = step(Decay(), {"rate": 2 * params["rate"]}, carry, x)
        contract.assert_close(step(Cell(), Noted(params["rate"], "doubled"), carry, x), expected)


class TestModules:
    @scan_and_step
    @pytest.mark.parametrize("change", [lambda params: params, params_to_dict, nnx.State])
    def test_parameters_of_a_module_of_ones_own(self, door: Door, change: Any) -> None:
        """To JAX, an `nnx.Param` is a container; to a layer, its array."""
        params, carry, x = arguments(GRU)
        given = change(params._asdict() if change is nnx.State else params)
        variables = jax.tree.map(nnx.Param, given)
        contract.assert_close(door(GRU, variables, carry, x), door(GRU, params, carry, x))
        wrong = jax.tree.map(nnx.Param, params._replace(b_hh=jnp.ones(1)))
        with pytest.raises(ValueError, match=r"params b_hh: expected shape \(15,\), got \(1,\)"):
            door(GRU, wrong, carry, x)

    def test_linen_with_variables_of_a_layer_with_biases(self) -> None:
        x = jnp.ones((2, 3))
        variables = seqjax.linen.GRUCell(3, 5).init(jax.random.key(0), x)
        for without in (
            seqjax.linen.GRUCell(3, 5, bias=False),
            seqjax.linen.Recurrent(seqjax.GRUCell(3, 5, bias=False)),
        ):
            with pytest.raises(TypeError, match="got: unexpected b_hh, b_ih"):
                without.apply(variables, x)

    def test_linen_with_variables_of_more_layers(self) -> None:
        """Flax itself says nothing."""
        three, two = (shells.build("linen", "GRU", 3, 5, layers) for layers in (3, 2))
        x = jnp.ones((7, 2, 3))
        message = r"got: unexpected layers_2/\w_.h, layers_2/"
        with pytest.raises(TypeError, match=message):
            two.apply(three.params, x)
        variables = {"params": three.params}
        with pytest.raises(TypeError, match=message):
            seqjax.linen.torch_state_dict(two.module, variables)
        with pytest.raises(TypeError, match=message):
            seqjax.linen.load_torch_state_dict(two.module, variables, {})
        del three.params["layers_2"]
        two.apply(three.params, x)

    @pytest.mark.parametrize(
        ("given", "difference"),
        [(True, "; unexpected layers_0/backward/"), (False, "missing layers_0/forward/w_ih")],
    )
    def test_linen_with_variables_of_other_directions(self, given: bool, difference: str) -> None:
        """To Flax, the first arrays fit."""
        one, other = (
            shells.build("linen", "GRU", 3, 5, bidirectional=b) for b in (given, not given)
        )
        with pytest.raises(TypeError, match=f"got: .*{difference}"):
            other.apply(one.params, jnp.ones((7, 2, 3)))

    def test_linen_in_a_scope_with_others(self) -> None:
        """A wrapper may keep parameters of its own beside those of the module that it wraps."""

        class Scaled(nn.Module):
            def setup(self) -> None:
                self.gru = seqjax.linen.GRU(3, 5)
                nn.share_scope(self, self.gru)
                self.scale = self.param("scale", nn.initializers.ones, ())

            def __call__(self, x: jax.Array) -> jax.Array:
                return self.scale * self.gru(x)[0]

        made, x = shells.build("linen", "GRU", 3, 5), jnp.ones((7, 2, 3))
        got = Scaled().apply({"params": made.params | {"scale": jnp.float32(2)}}, x)
        contract.assert_close(got, 2 * made(x)[0])

    @pytest.mark.parametrize("shell", shells.SHELLS)
    def test_another_shape(self, shell: str) -> None:
        one, other = (shells.build(shell, "GRU", 3, size) for size in (5, 6))
        with pytest.raises(Exception, match=r"\(3, 15\)|\(15,\)"):
            one.apply(other.params, jnp.ones((7, 2, 3)))


class TestTransformations:
    """What the checks see inside of them is right."""

    @scan_and_step
    def test_vmap_over_parameters(self, door: Door) -> None:
        params = [cases.random_params(GRU, seed) for seed in (5, 6)]
        _, carry, x = arguments(GRU)
        together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
        _, ys = jax.vmap(lambda params: door(GRU, params, carry, x))(together)
        expected = [door(GRU, one, carry, x)[1] for one in params]
        contract.assert_close(ys, np.stack(expected))

    @scan_and_step
    def test_vmap_over_rows(self, door: Door) -> None:
        params, carry, x = arguments(GRU)
        rows = jax.vmap(functools.partial(door, GRU, params), out_axes=(0, -2))(carry, x)
        contract.assert_close(rows, door(GRU, params, carry, x))

    @scan_and_step
    def test_checkpoint_in_a_loop(self, door: Door) -> None:
        params, carry, x = arguments(GRU)

        @jax.checkpoint
        def body(carry: Any, x: Any) -> Any:
            return door(GRU, params, carry, x)[0], None

        got, _ = jax.lax.scan(body, carry, jnp.stack([x, x]))
        contract.assert_close(got, step(GRU, params, step(GRU, params, carry, x)[0], x)[0])

    @scan_and_step
    def test_shapes_alone(self, door: Door) -> None:
        params, carry, x = jax.eval_shape(lambda: arguments(GRU))
        new, y = jax.eval_shape(functools.partial(door, GRU), params._asdict(), carry, x)
        assert new.shape == (2, 5)
        assert y.shape[-2:] == (2, 5)

    @scan_and_step
    def test_shard_map(self, door: Door) -> None:
        """A device sees its own rows: here, all."""
        params, carry, x = arguments(GRU)
        mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        specs = (P(), P("data"), P("data"))
        run = jax.shard_map(
            lambda *args: door(GRU, *args)[0], mesh=mesh, in_specs=specs, out_specs=P("data")
        )
        contract.assert_close(jax.jit(run)(params, carry, x), door(GRU, params, carry, x)[0])

    @pytest.mark.parametrize("unit", ["batch", "other"])
    def test_symbolic_rows(self, unit: str) -> None:
        """Twice: what is known of a layer is not mixed with that of another program."""
        pytest.importorskip("flatbuffers")
        params, carry, x = arguments(GRU)
        for _ in range(2):
            scope = export.SymbolicScope()
            rows = tuple(
                export.symbolic_args_specs(leaf, f"{unit}, _", scope=scope) for leaf in (carry, x)
            )
            exported = export.export(jax.jit(GRU.step))(params, *rows)
            contract.assert_close(exported.call(params, carry, x), GRU.step(params, carry, x))
            message = rf"carry: expected shape \({unit}, 5\), got \(1, 5\)"
            with pytest.raises(ValueError, match=message):
                export.export(jax.jit(GRU.step))(params, carry[:1], rows[1])

    def test_x64(self) -> None:
        """What is known of a layer in 32 bit is not taken for what it is in 64."""

        class Counter(Decay):
            def initial_carry(self, batch_shape: Any = (), dtype: Any = jnp.float32) -> Any:
                return jnp.zeros(batch_shape, int)

            def step(self, params: Any, carry: Any, x: jax.Array) -> Any:
                return carry + 1, x

        params, _, x = arguments(Decay())
        assert step(Counter(), params, jnp.zeros(2, "int32"), x)[0].dtype == jnp.int32
        with jax.enable_x64(True):
            assert step(Counter(), params, jnp.zeros(2, "int64"), x)[0].dtype == jnp.int64
            with pytest.raises(TypeError, match="carry: expected dtype int64, got int32"):
                step(Counter(), params, jnp.zeros(2, "int32"), x)

    def test_no_transfers(self) -> None:
        """What a new layer takes is found out without computing anything."""
        layer = seqjax.GRUCell(3, 11)
        params, carry, x = arguments(layer)
        params = params._replace(b_ih=params.b_hh[:1])
        with jax.transfer_guard("disallow"), pytest.raises(ValueError, match="params b_ih"):
            layer.step(params, carry, x)


def test_reverse_is_no_string() -> None:
    params, carry, x = arguments(GRU)
    with pytest.raises(TypeError, match="reverse should be of type bool, got: str"):
        seqjax.scan(GRU, params, x[None], carry, reverse="False")  # type: ignore[arg-type]
