"""The modules' arguments, which both Flax shells have from one place."""

import dataclasses
import inspect
import re
import warnings
from typing import Any, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_inputs
from flax import linen as nn
from flax import nnx
from jax.typing import DTypeLike
from shells import CELLS, LAYERS, assert_same, build, differ

import seqjax
import seqjax.linen
import seqjax.nnx

SHELLS = {"nnx": seqjax.nnx, "linen": seqjax.linen}
OWN = {"nnx": {"rngs"}, "linen": {"deterministic", "parent", "name"}}
"""Arguments that only one shell has."""

OF_EVERY_MODULE = (
    "*, dtype=None, param_dtype=float32, kernel_init=None, recurrent_kernel_init=None, "
    "bias_init=None"
)
OVER_SEQUENCES = f"{OF_EVERY_MODULE}, implementation=None, remat=False"
CONSTRUCTORS = {
    "Recurrent": f"layer, {OVER_SEQUENCES}, batch_first=False",
    "RNN": "input_size, hidden_size, num_layers=1, nonlinearity='tanh', bias=True, "
    f"batch_first=False, dropout=0.0, bidirectional=False, {OVER_SEQUENCES}",
    "LSTM": "input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0, "
    f"bidirectional=False, proj_size=0, {OVER_SEQUENCES}",
    "GRU": "input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0, "
    f"bidirectional=False, {OVER_SEQUENCES}",
    "RNNCell": f"input_size, hidden_size, bias=True, nonlinearity='tanh', {OF_EVERY_MODULE}",
    "LSTMCell": f"input_size, hidden_size, bias=True, {OF_EVERY_MODULE}",
    "GRUCell": f"input_size, hidden_size, bias=True, {OF_EVERY_MODULE}",
}
CALLS = {
    "Recurrent": "input, carry=None, deterministic=None, *, lengths=None, mask=None",
    **dict.fromkeys(LAYERS, "input, hx=None, deterministic=None, *, lengths=None, mask=None"),
    **dict.fromkeys(CELLS, "input, hx=None"),
}

shells = pytest.mark.parametrize("shell", SHELLS)
kinds = pytest.mark.parametrize("kind", CONSTRUCTORS)


def signature(function: Any, *, without: set[str]) -> str:
    """A function's arguments as they are written, without their types, `self` and some names."""
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in without | {"self"}
    ]
    text = str(inspect.Signature(parameters)).replace("<class 'jax.numpy.float32'>", "float32")
    return text.removeprefix("(").removesuffix(")")


@shells
@kinds
def test_constructor(shell: str, kind: str) -> None:
    constructor = getattr(SHELLS[shell], kind).__init__
    assert signature(constructor, without=OWN[shell]) == CONSTRUCTORS[kind]


@kinds
def test_constructors_own_arguments(kind: str) -> None:
    rngs = inspect.signature(getattr(seqjax.nnx, kind).__init__).parameters["rngs"]
    assert (rngs.kind, rngs.default) == (rngs.KEYWORD_ONLY, rngs.empty)
    linen = inspect.signature(getattr(seqjax.linen, kind)).parameters
    assert ("deterministic" in linen) == (kind not in CELLS)
    if "deterministic" in linen:
        deterministic = linen["deterministic"]
        assert (deterministic.kind, deterministic.default) == (rngs.KEYWORD_ONLY, None)


@kinds
def test_call(kind: str) -> None:
    nnx_call, linen_call = (getattr(shell, kind).__call__ for shell in SHELLS.values())
    assert signature(linen_call, without=set()) == CALLS[kind]
    own = "" if kind in CELLS else ", rngs=None"
    assert signature(nnx_call, without=set()) == CALLS[kind] + own


@shells
@kinds
def test_help_says_what_each_argument_means(shell: str, kind: str) -> None:
    module = getattr(SHELLS[shell], kind)
    arguments = inspect.signature(module.__init__).parameters
    expected = [name for name in arguments if name not in ("self", "parent", "name")]
    documentation = inspect.getdoc(module)
    section = documentation.partition("Args:\n")[2].partition("\n\n")[0]
    assert re.findall(r"^  (\w+): .", section, re.MULTILINE) == expected
    assert f"= seqjax.{shell}.{kind}(" in documentation
    if kind != "Recurrent":
        assert f"generated/torch.nn.{kind}.html" in documentation
        assert f"`seqjax.{kind.removesuffix('Cell')}Cell`" in documentation
        assert "Raises:\n  TypeError, ValueError" in documentation


@shells
@kinds
def test_help_says_what_each_argument_of_a_call_means(shell: str, kind: str) -> None:
    call = getattr(SHELLS[shell], kind).__call__
    documentation = inspect.getdoc(call)
    section = documentation.partition("Args:\n")[2].partition("\n\n")[0]
    expected = {*inspect.signature(call).parameters} - {"self"}
    assert expected <= {*re.findall(r"^  (\w+): .", section, re.MULTILINE)}
    assert "Returns:\n  " in documentation
    if kind != "Recurrent":
        assert "Raises:\n  TypeError, ValueError" in documentation


@shells
@kinds
def test_help_shows_types_as_they_are_written(shell: str, kind: str) -> None:
    call = inspect.signature(getattr(SHELLS[shell], kind).__call__)
    assert call.parameters["input"].annotation == "ArrayLike"
    state = "carry" if kind == "Recurrent" else "hx"
    assert call.parameters[state].annotation.endswith(" | None")


@shells
@kinds
def test_types_are_found_when_the_program_runs(shell: str, kind: str) -> None:
    module = getattr(SHELLS[shell], kind)
    assert get_type_hints(module.__call__).keys() >= {"input", "return"}
    hints = get_type_hints(module.__init__)
    assert hints["param_dtype"] == DTypeLike
    if shell == "nnx":
        assert hints["rngs"] is nnx.Rngs


@pytest.mark.parametrize("kind", LAYERS)
def test_the_warning_is_of_the_line_that_makes_the_module(kind: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(seqjax.nnx, kind)(3, 5, dropout=0.5, rngs=nnx.Rngs(0))
        getattr(seqjax.linen, kind)(3, 5, dropout=0.5)
    assert [warning.filename for warning in caught] == [__file__] * 2
    assert caught[0].lineno + 1 == caught[1].lineno


def make(shell: str, kind: str, **options: Any) -> Any:
    """A module with weights yet to be drawn."""
    args = (seqjax.GRUCell(3, 5),) if kind == "Recurrent" else (3, 5)
    if shell == "linen":
        return seqjax.linen.__dict__[kind](*args, **options)
    return nnx.eval_shape(lambda: seqjax.nnx.__dict__[kind](*args, **options, rngs=nnx.Rngs(0)))


@shells
@kinds
@pytest.mark.parametrize("name", ["dtype", "param_dtype"])
@pytest.mark.parametrize("dtype", ["float33", object, "int32", bool, complex])
def test_dtypes_are_floating(shell: str, kind: str, name: str, dtype: Any) -> None:
    message = re.escape(f"{name} should be a floating dtype, got: {dtype}")
    with pytest.raises(TypeError, match=f"^{message}"):
        make(shell, kind, **{name: dtype})


@shells
def test_weights_have_a_dtype(shell: str) -> None:
    with pytest.raises(TypeError, match="param_dtype should be a floating dtype, got: None"):
        make(shell, "GRU", param_dtype=None)


@shells
@kinds
@pytest.mark.parametrize("dtype", [float, "bfloat16", jnp.float16])
def test_dtypes_in_every_spelling(shell: str, kind: str, dtype: Any) -> None:
    made = make(shell, kind, dtype=dtype, param_dtype=dtype)
    assert (made.dtype, made.param_dtype) == (dtype, dtype)


@kinds
@pytest.mark.parametrize("rngs", [0, jax.random.key(0), nnx.Rngs(0).params, None])
def test_where_weights_are_drawn_from(kind: str, rngs: Any) -> None:
    args = (seqjax.GRUCell(3, 5),) if kind == "Recurrent" else (3, 5)
    message = rf"rngs should be an nnx.Rngs, such as nnx.Rngs\(0\), got: {type(rngs).__name__}"
    with pytest.raises(TypeError, match=message):
        getattr(seqjax.nnx, kind)(*args, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Sum(seqjax.Cell):
    """A cell without weights."""

    input_size: int
    params: Any = ()

    @property
    def output_size(self) -> int:
        return self.input_size

    def init(self, key: jax.Array, dtype: DTypeLike = jnp.float32) -> Any:
        return {} if self.params == "empty" else self.params

    def initial_carry(
        self, batch_shape: tuple[int, ...] = (), dtype: DTypeLike = jnp.float32
    ) -> jax.Array:
        return jnp.zeros((*batch_shape, self.input_size), dtype)

    def step(self, params: Any, carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return carry + x, carry + x


@shells
@pytest.mark.parametrize("params", [(), "empty", None])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_a_cell_without_weights(shell: str, params: Any, dtype: Any) -> None:
    x = random_inputs((6, 4, 3))
    output, carry = build(shell, "Recurrent", Sum(3, params), dtype=dtype)(x)
    assert output.dtype == (dtype or x.dtype)
    expected = jnp.cumsum(x.astype(output.dtype), 0)
    np.testing.assert_allclose(output, expected, rtol=1e-2 if dtype else 1e-6, atol=1e-6)
    np.testing.assert_array_equal(carry, output[-1])


@shells
def test_a_cell_without_weights_among_others(shell: str) -> None:
    x = random_inputs((6, 4, 3))
    made = build(shell, "Recurrent", seqjax.Stack([Sum(3), seqjax.GRUCell(3, 5)]))
    alone = build(shell, "Recurrent", seqjax.GRUCell(3, 5))
    alone.params = made.params["layers_1"]
    assert_same(made(x)[0], alone(jnp.cumsum(x, 0))[0], 1e-5)


@shells
@pytest.mark.parametrize("kind", [*LAYERS, "Recurrent"])
def test_deterministic_is_third(shell: str, kind: str) -> None:
    """So that transforms can hold it static, by its position."""
    stack = seqjax.Stack([seqjax.GRUCell(3, 5), seqjax.GRUCell(5, 5)], dropout=0.5)
    made = build(shell, "Recurrent", stack) if kind == "Recurrent" else None
    made = made or build(shell, kind, 3, 5, 2, dropout=0.5)
    x = random_inputs((6, 4, 3))
    if shell == "nnx":
        call = nnx.jit(lambda made, x, on: made(x, None, on), static_argnums=2)
        got = {on: call(made.module, x, on) for on in (True, False)}
    else:
        args = (stack,) if kind == "Recurrent" else (3, 5, 2)
        options = {} if kind == "Recurrent" else {"dropout": 0.5}
        remade = nn.remat(getattr(seqjax.linen, kind), static_argnums=3)(*args, **options)
        variables, rngs = {"params": made.params}, {"dropout": jax.random.key(0)}
        got = {on: remade.apply(variables, x, None, on, rngs=rngs) for on in (True, False)}
    expected = made.apply(made.params, x)
    assert_same(got[True], expected)
    assert differ(got[False][0], expected[0])


@shells
@pytest.mark.parametrize("kind", [*LAYERS, "Recurrent"])
def test_lengths_are_given_by_name(shell: str, kind: str) -> None:
    """By position they would be `deterministic`, at which nobody looks where nothing is dropped."""
    args = (seqjax.GRUCell(3, 5),) if kind == "Recurrent" else (3, 5)
    made = build(shell, kind, *args)
    with pytest.raises(TypeError, match=r"deterministic should be a bool .*lengths= and mask="):
        made(random_inputs((6, 4, 3)), None, jnp.array([6, 2, 0, 3]))


@pytest.mark.parametrize("kind", LAYERS)
def test_a_module_holds_what_its_layer_is_made_of_once(kind: str) -> None:
    module = getattr(seqjax.nnx, kind)(3, 5, 2, rngs=nnx.Rngs(0))
    assert "layer" not in vars(module)
    assert module.layer is module.layer
    module.dropout = 0.25
    assert module.layer.dropout == 0.25


class TestArgumentsThatChange:
    """Arguments of an NNX module are its attributes: given another value, they act or raise."""

    x = random_inputs((6, 4, 3))

    def test_dropout_off(self) -> None:
        made = build("nnx", "LSTM", 3, 5, 2, dropout=0.5)
        made.module.dropout = 0
        assert_same(made.module(self.x), build("nnx", "LSTM", 3, 5, 2)(self.x), 0)

    @pytest.mark.parametrize("args", [("GRU", 3, 5, 2), ("Recurrent", seqjax.GRUCell(3, 5))])
    def test_dropout_on(self, args: Any) -> None:
        made = build("nnx", *args).module
        calm = made(self.x)
        if args[0] == "GRU":
            made.set_attributes(dropout=0.5)
        else:
            made.layer = Noise(3, 5)
        with pytest.raises(
            ValueError, match=r"nothing to draw dropout from.*give rngs in the call"
        ):
            made(self.x)
        assert differ(made(self.x, rngs=nnx.Rngs(0))[0], calm[0])
        assert_same(made(self.x, deterministic=True), calm, 0)

    def test_others_that_act(self) -> None:
        made = build("nnx", "RNN", 3, 5).module
        made.nonlinearity = "relu"
        made.batch_first = True
        made.dtype = jnp.bfloat16
        expected = build("nnx", "RNN", 3, 5, 1, "relu", batch_first=True, dtype=jnp.bfloat16)
        assert_same(made(self.x), expected(self.x), 0)

    @pytest.mark.parametrize(
        ("kind", "name", "value"),
        [
            *[("LSTM", name, 2) for name in ("input_size", "hidden_size", "num_layers")],
            ("LSTM", "proj_size", 2),
            ("LSTM", "bias", False),
            ("LSTM", "bidirectional", True),
            ("LSTM", "param_dtype", "bfloat16"),
            ("GRUCell", "hidden_size", 4),
            ("GRUCell", "bias", False),
            ("Recurrent", "layer", seqjax.GRUCell(3, 4)),
        ],
    )
    def test_what_weights_are_made_for(self, kind: str, name: str, value: Any) -> None:
        made = make("nnx", kind)
        before = getattr(made, name)
        message = f"weights are made for {name}={before!r}: make another module with {name}="
        with pytest.raises(ValueError, match=re.escape(message)):
            setattr(made, name, value)
        assert getattr(made, name) == before
        setattr(made, name, before)

    @pytest.mark.parametrize(
        ("name", "value", "error", "message"),
        [
            ("dropout", 2, ValueError, "dropout should be a number in range"),
            ("batch_first", 1, TypeError, "batch_first should be of type bool, got: int"),
            ("hidden_size", 0, ValueError, "hidden_size must be greater than zero, got: 0"),
            ("dtype", int, TypeError, "dtype should be a floating dtype"),
        ],
    )
    def test_what_no_module_has(self, name: str, value: Any, error: Any, message: str) -> None:
        made = make("nnx", "GRU")
        before = getattr(made, name)
        with pytest.raises(error, match=message):
            setattr(made, name, value)
        assert getattr(made, name) == before

    def test_copies_change_alone(self) -> None:
        made = build("nnx", "LSTM", 3, 5, 2, dropout=0.5).module
        other = nnx.clone(made)
        other.dropout = 0
        assert (made.layer.dropout, other.layer.dropout) == (0.5, 0)
        with pytest.raises(ValueError, match="weights are made for hidden_size=5"):
            other.hidden_size = 4

    def test_inside_jit(self) -> None:
        @nnx.jit
        def change(made: Any) -> None:
            made.dropout = 0.25

        made = build("nnx", "LSTM", 3, 5, 2, dropout=0.5).module
        change(made)
        assert made.layer.dropout == 0.25


@dataclasses.dataclass(frozen=True)
class Noise(seqjax.GRUCell):
    """A cell that draws in training."""

    draws_dropout = True

    def run(self, params: Any, carry: Any, xs: jax.Array, *, key: Any, **options: Any) -> Any:
        if key is not None:
            xs = xs + jax.random.normal(key, xs.shape)
        return super().run(params, carry, xs, key=key, **options)


@shells
@pytest.mark.parametrize(
    ("kind", "arguments", "cell"),
    [
        ("RNN", {"nonlinearity": "relu"}, seqjax.RNNCell(3, 5, False, "relu")),
        ("LSTM", {"proj_size": 2}, seqjax.LSTMCell(3, 5, False, 2)),
        ("GRU", {}, seqjax.GRUCell(3, 5, False)),
        ("RNNCell", {"nonlinearity": "relu"}, seqjax.RNNCell(3, 5, False, "relu")),
        ("LSTMCell", {}, seqjax.LSTMCell(3, 5, False)),
        ("GRUCell", {}, seqjax.GRUCell(3, 5, False)),
    ],
)
def test_a_modules_cell_has_its_arguments(
    shell: str, kind: str, arguments: dict[str, Any], cell: seqjax.Cell
) -> None:
    made = build(shell, kind, 3, 5, bias=False, **arguments)
    assert made.layer == (cell if kind in CELLS else seqjax.Stack([cell]))
