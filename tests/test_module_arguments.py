"""The modules' arguments, which both Flax shells have from one place."""

import inspect
import re
import warnings
from typing import Any, get_type_hints

import pytest
from flax import nnx
from jax.typing import DTypeLike
from shells import CELLS, LAYERS, build

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
    "Recurrent": "input, carry=None, *, lengths=None, mask=None, deterministic=None",
    **dict.fromkeys(LAYERS, "input, hx=None, *, lengths=None, mask=None, deterministic=None"),
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


@pytest.mark.parametrize("kind", LAYERS)
def test_a_module_holds_what_its_layer_is_made_of_once(kind: str) -> None:
    module = getattr(seqjax.nnx, kind)(3, 5, 2, rngs=nnx.Rngs(0))
    assert "layer" not in vars(module)
    assert module.layer is module.layer
    module.dropout = 0.25
    assert module.layer.dropout == 0.25


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
