"""PyTorch's weights in and out: exact, checked, and copied."""

import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import (
    Arrays,
    Config,
    empty_linen_module,
    empty_nnx_module,
    quick_compilation,
    random_weights,
)

import seqjax
import seqjax.linen
import seqjax.nnx
from seqjax.interop import params_from_torch, params_to_torch

try:
    import torch
    import torch.nn.utils.prune
except ModuleNotFoundError:
    torch = None

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
needs_torch = pytest.mark.skipif(torch is None, reason="needs torch")

SIZES = {"input_size": 3, "hidden_size": 5}
BIDIRECTIONAL = {"num_layers": 2, "bidirectional": True}
CONFIGS = {
    "rnn": Config("RNN", **SIZES, nonlinearity="relu"),
    "rnn_no_bias": Config("RNN", **SIZES, **BIDIRECTIONAL, bias=False),
    "lstm": Config("LSTM", **SIZES, **BIDIRECTIONAL),
    "lstm_proj": Config("LSTM", **SIZES, **BIDIRECTIONAL, proj_size=2),
    "lstm_proj_no_bias": Config("LSTM", **SIZES, num_layers=3, proj_size=2, bias=False),
    "gru": Config("GRU", **SIZES, num_layers=2),
    "gru_bidirectional": Config("GRU", **SIZES, bidirectional=True),
    "rnn_cell": Config("RNNCell", **SIZES, nonlinearity="relu"),
    "lstm_cell": Config("LSTMCell", **SIZES),
    "lstm_cell_no_bias": Config("LSTMCell", **SIZES, bias=False),
    "gru_cell": Config("GRUCell", **SIZES),
}
EVERY_KIND = ["rnn", "lstm_proj", "gru", "rnn_cell", "lstm_cell", "gru_cell"]


def weights_of(config: Config, dtype: str = "float32", seed: int = 0) -> Arrays:
    weights = random_weights(config, np.random.default_rng(seed))
    return {name: weight.astype(dtype) for name, weight in weights.items()}


def assert_equal(state_dict: Arrays, expected: Arrays) -> None:
    """The same names in the same order, and the same numbers to the last bit."""
    assert list(state_dict) == list(expected)
    for name, array in expected.items():
        assert isinstance(state_dict[name], np.ndarray)
        np.testing.assert_array_equal(state_dict[name], array, strict=True, err_msg=name)


class NnxModule:
    """A module of `seqjax.nnx` with the interface that the tests need."""

    def __init__(self, module: Any) -> None:
        self.module = module

    @classmethod
    def make(cls, config: Config, **options: Any) -> "NnxModule":
        return cls(empty_nnx_module(config, **options))

    @classmethod
    def from_torch(cls, torch_module: Any) -> "NnxModule":
        kind = next(base.__name__ for base in type(torch_module).__mro__ if base.__name__ in KINDS)
        return cls(getattr(seqjax.nnx, kind).from_torch(torch_module))

    def load(self, state_dict: Any, **options: Any) -> None:
        self.module.load_torch_state_dict(state_dict, **options)

    def state_dict(self) -> Arrays:
        return self.module.torch_state_dict()

    def leaves(self) -> list[jax.Array]:
        return jax.tree.leaves(nnx.state(self.module, nnx.Param))

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)


class LinenModule:
    """A module of `seqjax.linen` and its variables with the same interface."""

    def __init__(self, module: Any, variables: Any) -> None:
        self.module, self.variables = module, variables

    @classmethod
    def make(cls, config: Config, **options: Any) -> "LinenModule":
        return cls(*empty_linen_module(config, **options))

    @classmethod
    def from_torch(cls, torch_module: Any) -> "LinenModule":
        return cls(*seqjax.linen.from_torch(torch_module))

    def load(self, state_dict: Any, **options: Any) -> None:
        self.variables = seqjax.linen.load_torch_state_dict(
            self.module, self.variables, state_dict, **options
        )

    def state_dict(self) -> Arrays:
        return seqjax.linen.torch_state_dict(self.module, self.variables)

    def leaves(self) -> list[jax.Array]:
        return jax.tree.leaves(self.variables)

    def __call__(self, *args: Any) -> Any:
        return self.module.apply(self.variables, *args)


KINDS = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
SHELLS = [NnxModule, LinenModule]


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation() -> Iterator[None]:
    with quick_compilation():
        yield


# Round trips


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_of_params(name: str) -> None:
    config = CONFIGS[name]
    weights = weights_of(config)
    params = params_from_torch(weights)
    expected_structure = jax.eval_shape(config.core_layer().init, jax.random.key(0))
    assert jax.tree.structure(params) == jax.tree.structure(expected_structure)
    exported = params_to_torch(params)
    assert_equal(exported, weights)
    again = params_from_torch(exported)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_layout() -> None:
    """What goes where, on numbers: the transpose, both biases, and the backward direction."""
    weights = weights_of(CONFIGS["lstm_proj"])
    _, second = params_from_torch(weights)
    np.testing.assert_array_equal(second.forward.w_ih, weights["weight_ih_l1"].T)
    np.testing.assert_array_equal(second.forward.w_hh, weights["weight_hh_l1"].T)
    np.testing.assert_array_equal(second.forward.b_ih, weights["bias_ih_l1"])
    np.testing.assert_array_equal(second.backward.b_hh, weights["bias_hh_l1_reverse"])
    np.testing.assert_array_equal(second.backward.w_hr, weights["weight_hr_l1_reverse"].T)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name", ["rnn_no_bias", *EVERY_KIND])
def test_round_trip_of_modules(name: str, shell: Any) -> None:
    config = CONFIGS[name]
    weights = weights_of(config)
    module = shell.make(config)
    module.load(weights)
    assert_equal(module.state_dict(), weights)
    other = shell.make(config)
    other.load(module.state_dict())
    assert_equal(other.state_dict(), weights)


def test_order_of_entries_does_not_matter() -> None:
    weights = weights_of(CONFIGS["lstm_proj"])
    shuffled = dict(sorted(weights.items(), reverse=True))
    assert_equal(params_to_torch(params_from_torch(shuffled)), weights)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_dtypes(dtype: str, x64: None) -> None:
    """Each array keeps its dtype; bfloat16 leaves as float32, for NumPy has no such dtype."""
    weights = weights_of(CONFIGS["lstm_proj"], dtype=dtype)
    params = params_from_torch(weights)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    out = "float32" if dtype == "bfloat16" else dtype
    assert_equal(params_to_torch(params), {n: w.astype(out) for n, w in weights.items()})
    assert_equal(params_to_torch(params_from_torch(weights, "float32")),
                 {name: weight.astype("float32") for name, weight in weights.items()})  # fmt: skip


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_modules_cast_to_their_own_dtype(dtype: str, shell: Any, x64: None) -> None:
    config = CONFIGS["gru"]
    module = shell.make(config, param_dtype=dtype)
    module.load(weights_of(config, "float32"))
    assert {leaf.dtype for leaf in module.leaves()} == {jnp.dtype(dtype)}
    out = "float32" if dtype == "bfloat16" else dtype
    expected = {n: w.astype(dtype).astype(out) for n, w in weights_of(config, "float32").items()}
    assert_equal(module.state_dict(), expected)


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray, np.ndarray.tolist])
def test_anything_like_an_array(convert: Callable[[np.ndarray], Any]) -> None:
    weights = weights_of(CONFIGS["gru"])
    given = {name: convert(weight) for name, weight in weights.items()}
    assert_equal(params_to_torch(params_from_torch(given, "float32")), weights)
    module = NnxModule.make(CONFIGS["gru"])
    module.load(given)
    assert_equal(module.state_dict(), weights)


def test_not_in_torch() -> None:
    """What PyTorch's layers cannot hold is refused, not mangled."""
    lstm = seqjax.LSTMCell(3, 5)
    pair = seqjax.Bidirectional(lstm, lstm)
    for layer in (pair, seqjax.Stack([seqjax.Stack([lstm])]), seqjax.Bidirectional(pair, pair)):
        params = layer.init(jax.random.key(0))
        with pytest.raises(TypeError, match="PyTorch has only"):
            params_to_torch(params)
    nested = seqjax.Stack([seqjax.Bidirectional(pair, pair)])
    with pytest.raises(TypeError, match="PyTorch has only"):
        params_to_torch(nested.init(jax.random.key(0)))


# Wrong state dicts

WRONG: dict[str, tuple[Callable[[Arrays], Arrays], list[str]]] = {
    "missing": (
        lambda weights: {n: w for n, w in weights.items() if n != "weight_hh_l1"},
        ["weight_hh_l1"],
    ),
    "one bias missing": (
        lambda weights: {n: w for n, w in weights.items() if n != "bias_hh_l0_reverse"},
        ["bias_hh_l0_reverse"],
    ),
    "unexpected": (lambda weights: {**weights, "head.weight": np.ones((2, 2))}, ["head.weight"]),
    "prefixed": (
        lambda weights: {f"lstm.{n}": w for n, w in weights.items()},
        ["lstm.weight_ih_l0"],
    ),
    "misshapen": (
        lambda weights: {**weights, "weight_hh_l0": np.ones((20, 4))},
        ["weight_hh_l0", "(20, 4)"],
    ),
    "transposed": (
        lambda weights: {**weights, "weight_ih_l0": weights["weight_ih_l0"].T},
        ["weight_ih_l0", "(3, 20)"],
    ),
    "one dimension too many": (
        lambda weights: {**weights, "bias_ih_l0": weights["bias_ih_l0"][None]},
        ["bias_ih_l0", "(1, 20)"],
    ),
    "empty": (lambda weights: {}, ["weight_ih"]),
    "cell and layer": (
        lambda weights: {**weights, "weight_ih": weights["weight_ih_l0"]},
        ["weight_ih"],
    ),
    "gap in layers": (
        lambda weights: (
            {n: w for n, w in weights.items() if "_l1" not in n}
            | {n.replace("_l1", "_l2"): w for n, w in weights.items() if "_l1" in n}
        ),
        ["weight_ih_l1"],
    ),
    "one direction missing": (
        lambda weights: {n: w for n, w in weights.items() if not n.endswith("l1_reverse")},
        ["weight_ih_l1_reverse"],
    ),
    "no numbered layer": (
        lambda weights: {**weights, "weight_ih_l01": weights["weight_ih_l1"]},
        ["weight_ih_l01"],
    ),
}


@pytest.mark.parametrize("how", WRONG)
def test_core_names_what_is_wrong(how: str) -> None:
    change, named = WRONG[how]
    state_dict = change(weights_of(CONFIGS["lstm"]))
    with pytest.raises(ValueError, match=re.escape(named[0])) as error:
        params_from_torch(state_dict)
    assert all(name in str(error.value) for name in named)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("how", WRONG)
def test_modules_name_what_is_wrong_and_stay_as_they_were(how: str, shell: Any) -> None:
    change, named = WRONG[how]
    module = made(shell)
    before = module.state_dict()
    with pytest.raises(ValueError, match=re.escape(named[0])) as error:
        module.load(change(weights_of(CONFIGS["lstm"])))
    assert all(name in str(error.value) for name in named)
    assert "LSTM" in str(error.value)
    assert_equal(module.state_dict(), before)


@functools.cache
def made(shell: Any) -> Any:
    """A module that no test changes: each shows that it did not."""
    module = shell.make(CONFIGS["lstm"])
    module.load(weights_of(CONFIGS["lstm"], seed=1))
    return module


@pytest.mark.parametrize("shell", SHELLS)
def test_everything_wrong_is_named_at_once(shell: Any) -> None:
    weights = weights_of(CONFIGS["lstm"])
    del weights["weight_hh_l0"], weights["bias_ih_l1"]
    weights |= {"weight_hr_l0": np.ones((2, 5)), "head.bias": np.ones(3)}
    weights |= {"weight_ih_l0": np.ones((20, 4)), "bias_hh_l1_reverse": np.ones(15)}
    module = made(shell)
    before = module.state_dict()
    with pytest.raises(ValueError, match="LSTM") as error:
        module.load(weights)
    missing, unexpected, *mismatched = str(error.value).splitlines()[1:]
    assert "Missing" in missing
    assert re.findall('"(.*?)"', missing) == ["bias_ih_l1", "weight_hh_l0"]
    assert "Unexpected" in unexpected
    assert re.findall('"(.*?)"', unexpected) == ["head.bias", "weight_hr_l0"]
    assert len(mismatched) == 2
    for name, got, expected in (
        ("weight_ih_l0", (20, 4), (20, 3)),
        ("bias_hh_l1_reverse", (15,), (20,)),
    ):
        [line] = [line for line in mismatched if f" {name}:" in line]
        assert str(got) in line
        assert str(expected) in line
    assert_equal(module.state_dict(), before)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("lstm", "gru_bidirectional"),  # Another kind of gates
        ("gru", "gru_bidirectional"),  # layers and directions
        ("gru_cell", "gru"),
        ("gru", "gru_cell"),
        ("lstm", "lstm_proj"),
        ("rnn", "rnn_no_bias"),
        ("rnn_no_bias", "rnn"),
    ],
)
def test_another_modules_weights(name: str, other: str, shell: Any) -> None:
    module = shell.make(CONFIGS[name])
    before = module.state_dict()
    with pytest.raises(ValueError, match="Error"):
        module.load(weights_of(CONFIGS[other]))
    assert_equal(module.state_dict(), before)


# State dicts of whole models


def model_state_dict() -> Arrays:
    """A model that was compiled and spread over devices, with more in it than arrays."""
    weights = {"embedding.weight": np.ones((9, 3)), "quantised._packed_params": (None, 8)}
    for prefix, name in [("encoder.rnn.", "lstm"), ("decoder.", "gru_cell")]:
        entries = weights_of(CONFIGS[name])
        weights |= {prefix + key: array for key, array in entries.items()}
    return {f"module._orig_mod.{name}": array for name, array in weights.items()}


@pytest.mark.parametrize("dot", ["", "."])
def test_prefix(dot: str) -> None:
    """With a dot at its end, as `Module.state_dict` takes it, and without, as names of modules."""
    for inside, name in [("encoder.rnn", "lstm"), ("decoder", "gru_cell")]:
        prefix, expected = f"module._orig_mod.{inside}{dot}", weights_of(CONFIGS[name])
        assert_equal(
            params_to_torch(params_from_torch(model_state_dict(), prefix=prefix)), expected
        )
        for shell in SHELLS:
            module = shell.make(CONFIGS[name])
            module.load(model_state_dict(), prefix=prefix)
            assert_equal(module.state_dict(), expected)


@pytest.mark.parametrize("prefix", ["", "encoder.rnn.", "module._orig_mod.encoder", "module"])
def test_wrong_prefix_is_told_the_right_ones(prefix: str) -> None:
    before = made(NnxModule).state_dict()
    loads = [made(shell).load for shell in SHELLS]
    for load in [params_from_torch, *loads]:
        with pytest.raises(ValueError, match="give one of these as prefix") as error:
            load(model_state_dict(), prefix=prefix)
        found = '"module._orig_mod.decoder.", "module._orig_mod.encoder.rnn."'
        assert f"It holds recurrent layers under {found}" in str(error.value)
    assert_equal(made(NnxModule).state_dict(), before)


def test_prefix_of_a_model_without_recurrent_layers() -> None:
    message = 'nothing under the prefix "rnn.". It holds no weights of an RNN, LSTM or GRU'
    with pytest.raises(ValueError, match=message):
        params_from_torch({"head.weight": np.ones((2, 2))}, prefix="rnn")


def test_no_advice_about_other_layers_where_the_prefix_is_right() -> None:
    state_dict = model_state_dict()
    del state_dict["module._orig_mod.encoder.rnn.weight_hh_l1"]
    with pytest.raises(ValueError, match=r'Missing key.* "weight_hh_l1"') as error:
        made(NnxModule).load(state_dict, prefix="module._orig_mod.encoder.rnn")
    assert "prefix" not in str(error.value)


@pytest.mark.parametrize("wrong", [None, "model.pt", [("weight_ih", np.ones((5, 3)))], object()])
def test_no_state_dict(wrong: Any) -> None:
    for load in [params_from_torch, *(made(shell).load for shell in SHELLS)]:
        with pytest.raises(TypeError, match=f"module.state_dict.*got: {type(wrong).__name__}"):
            load(wrong)


@pytest.mark.parametrize("wrong", [np.ones((15, 3), np.int8), [["a"]], {"nested": 1}])
def test_no_numbers(wrong: Any) -> None:
    weights = weights_of(CONFIGS["gru"]) | {"weight_ih_l0": wrong}
    loads = [shell.make(CONFIGS["gru"]).load for shell in SHELLS]
    for load in [params_from_torch, *loads]:
        with pytest.raises(ValueError, match='"weight_ih_l0" should be of floating dtype, got: '):
            load(weights)


def test_several_dtypes() -> None:
    """PyTorch does not compute with them; a module has its own dtype, to which they are cast."""
    weights = weights_of(CONFIGS["gru"])
    mixed = weights | {"bias_ih_l0": weights["bias_ih_l0"].astype("float16")}
    message = "one dtype, got: weight_ih_l0 float32, .*bias_ih_l0 float16"
    with pytest.raises(ValueError, match=message):
        params_from_torch(mixed)
    params = params_from_torch(mixed, "float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    for shell in SHELLS:
        module = shell.make(CONFIGS["gru"])
        module.load(mixed)
        assert module.state_dict()["bias_ih_l0"].dtype == "float32"


# Copies


def test_arrays_are_copied_in_and_out() -> None:
    weights = weights_of(CONFIGS["lstm_proj"])
    expected = {name: weight.copy() for name, weight in weights.items()}
    params = params_from_torch(weights)
    module = NnxModule.make(CONFIGS["lstm_proj"])
    module.load(weights)
    for weight in weights.values():
        weight += 1
    assert_equal(params_to_torch(params), expected)
    assert_equal(module.state_dict(), expected)

    exported = [params_to_torch(params), module.state_dict()]
    for array in [array for state_dict in exported for array in state_dict.values()]:
        array += 1  # It is writable, as torch.from_numpy wants it,
    assert_equal(params_to_torch(params), expected)  # and no view into an immutable array.
    assert_equal(module.state_dict(), expected)


# With real modules


def torch_module_of(config: Config, dtype: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    kind = getattr(torch.nn, config.kind)
    return kind(**config.arguments, **options, dtype=dtype or torch.float32)


def torch_call(module: Any, input: np.ndarray, dtype: Any = None) -> list[np.ndarray]:
    with torch.no_grad():
        results = module(torch.from_numpy(input).to(dtype or torch.float32))
    return [leaf.float().numpy() for leaf in jax.tree.leaves(results)]


@needs_torch
@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name", EVERY_KIND)
def test_from_torch(name: str, shell: Any) -> None:
    """The configuration, the weights, and the numbers."""
    config = CONFIGS[name]
    layer_options = {} if config.is_cell else {"batch_first": True}
    theirs = torch_module_of(config, **layer_options)
    ours = shell.from_torch(theirs)
    assert type(ours.module) is type(shell.make(config).module)
    assert_equal(ours.state_dict(), {n: w.numpy() for n, w in theirs.state_dict().items()})
    for key, value in (config.arguments | layer_options).items():
        assert getattr(ours.module, key) == getattr(theirs, key) == value
    shape = (4, 3) if config.is_cell else (4, 6, 3)
    input = np.random.default_rng(0).standard_normal(shape).astype("float32")
    for one, other in zip(jax.tree.leaves(ours(input)), torch_call(theirs, input), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@needs_torch
@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_from_torch_keeps_the_dtype(dtype: str, shell: Any, x64: None) -> None:
    theirs = torch_module_of(CONFIGS["lstm_proj"], getattr(torch, dtype))
    ours = shell.from_torch(theirs)
    assert {leaf.dtype for leaf in ours.leaves()} == {jnp.dtype(dtype)}
    expected = theirs.state_dict()
    for name, array in ours.state_dict().items():
        np.testing.assert_array_equal(array, expected[name].to(torch.float64).numpy())
    direct = params_from_torch(expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(direct)} == {jnp.dtype(dtype)}


@needs_torch
@pytest.mark.parametrize("training", [True, False])
def test_from_torch_keeps_dropout_and_mode(training: bool) -> None:
    theirs = torch.nn.GRU(3, 5, 2, dropout=0.5).train(training)
    input = np.ones((6, 4, 3), np.float32)
    ours = seqjax.nnx.GRU.from_torch(theirs, rngs=nnx.Rngs(3))
    assert ours.dropout == 0.5
    one, other = ours(input)[0], ours(input)[0]
    assert (one != other).any() == training
    module, variables = seqjax.linen.from_torch(theirs)
    assert module.dropout == 0.5
    output, _ = module.apply(variables, input, deterministic=True)
    expected, *_ = torch_call(theirs.eval(), input)
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-6)


@needs_torch
def test_from_torch_takes_a_subclass() -> None:
    class Encoder(torch.nn.GRU):
        pass

    theirs = Encoder(3, 5)
    expected = {name: weight.numpy() for name, weight in theirs.state_dict().items()}
    assert_equal(seqjax.nnx.GRU.from_torch(theirs).torch_state_dict(), expected)
    module, variables = seqjax.linen.from_torch(theirs)
    assert isinstance(module, seqjax.linen.GRU)
    assert_equal(seqjax.linen.torch_state_dict(module, variables), expected)


@needs_torch
def test_from_torch_refuses_another_kind() -> None:
    for theirs in KINDS:
        module = torch_module_of(Config(theirs, **SIZES))
        for ours in set(KINDS) - {theirs}:
            with pytest.raises(TypeError, match=rf"expected a torch\.nn\.{ours}, got: {theirs}$"):
                getattr(seqjax.nnx, ours).from_torch(module)
    with pytest.raises(TypeError, match="got: Linear"):
        seqjax.linen.from_torch(torch.nn.Linear(3, 5))


def test_from_torch_refuses_what_is_no_module() -> None:
    """Without torch at hand, too."""
    for wrong in (SimpleNamespace(), {}, None, "LSTM"):
        for from_torch in (seqjax.nnx.GRU.from_torch, seqjax.linen.from_torch):
            with pytest.raises(TypeError, match=f"got: {type(wrong).__name__}"):
                from_torch(wrong)


@needs_torch
@pytest.mark.parametrize("shell", SHELLS)
def test_training_torch_afterwards_changes_nothing_here(shell: Any) -> None:
    theirs = torch_module_of(CONFIGS["lstm_proj"])
    ours = shell.from_torch(theirs)
    loaded = shell.make(CONFIGS["lstm_proj"])
    loaded.load(theirs.state_dict())
    params = params_from_torch(theirs.state_dict())
    before = {name: weight.numpy().copy() for name, weight in theirs.state_dict().items()}
    optimizer = torch.optim.SGD(theirs.parameters(), lr=1.0)
    theirs(torch.ones(6, 4, 3))[0].sum().backward()
    optimizer.step()  # In place
    for name, weight in theirs.state_dict().items():
        assert (weight.numpy() != before[name]).any()
    for state_dict in (ours.state_dict(), loaded.state_dict(), params_to_torch(params)):
        assert_equal(state_dict, before)


@needs_torch
@pytest.mark.parametrize("name", EVERY_KIND)
def test_exported_weights_in_torch(name: str) -> None:
    """load_state_dict takes them, gives the same numbers, and does not write into ours."""
    config = CONFIGS[name]
    ours = NnxModule.make(config)
    ours.load(weights_of(config))
    exported = ours.state_dict()
    theirs = torch_module_of(config)
    tensors = {key: torch.from_numpy(array) for key, array in exported.items()}
    theirs.load_state_dict(tensors, strict=True)
    assert list(exported) == list(theirs.state_dict())
    shape = (4, 3) if config.is_cell else (6, 4, 3)
    input = np.random.default_rng(0).standard_normal(shape).astype("float32")
    for one, other in zip(jax.tree.leaves(ours(input)), torch_call(theirs, input), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    theirs.load_state_dict(tensors, strict=True, assign=True)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(1)
    assert_equal(ours.state_dict(), weights_of(config))


# PyTorch's objects


def prune_by_hand(module: Any, name: str) -> None:
    class EveryOther(torch.nn.utils.prune.BasePruningMethod):  # As PyTorch's tutorial makes one.
        PRUNING_TYPE = "unstructured"

        def compute_mask(self, tensor: Any, default_mask: Any) -> Any:
            mask = default_mask.clone()
            mask.view(-1)[::2] = 0
            return mask

    EveryOther.apply(module, name)


def prune_twice(module: Any, name: str) -> None:
    torch.nn.utils.prune.l1_unstructured(module, name, amount=0.3)
    torch.nn.utils.prune.ln_structured(module, name, amount=0.2, n=2, dim=0)


# Named by what PyTorch calls them; each makes weights of other tensors.
MAKES_WEIGHTS = {
    "weight_norm": lambda m, name: torch.nn.utils.weight_norm(m, name),
    "parametrizations.weight_norm": lambda m, name: torch.nn.utils.parametrizations.weight_norm(
        m, name
    ),
    "spectral_norm": lambda m, name: torch.nn.utils.spectral_norm(m, name),
    "parametrizations.spectral_norm": lambda m, name: torch.nn.utils.parametrizations.spectral_norm(
        m, name
    ),
    "parametrizations.orthogonal": lambda m, name: torch.nn.utils.parametrizations.orthogonal(
        m, name
    ),
    "prune": prune_by_hand,
    "prune twice": prune_twice,
}


@needs_torch
@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.* is deprecated")
@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name", ["gru_bidirectional", "lstm_cell"])
@pytest.mark.parametrize("how", MAKES_WEIGHTS)
def test_from_torch_takes_the_weights_in_effect(how: str, name: str, shell: Any) -> None:
    """After training, when the module's attributes are those of the call before."""
    config = CONFIGS[name]
    theirs = torch_module_of(config)
    for weight in [*theirs.state_dict()][:2]:  # Of two, one is "weight_hh_l0", a name's beginning.
        MAKES_WEIGHTS[how](theirs, weight)
    input = np.random.default_rng(0).standard_normal((4, 6, 3)[config.is_cell :]).astype("float32")
    optimizer = torch.optim.SGD(theirs.parameters(), lr=1.0)
    jax.tree.leaves(theirs(torch.from_numpy(input)))[0].sum().backward()
    optimizer.step()
    before = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}

    with pytest.raises(ValueError, match=r"from_torch\(module\) takes what they make"):
        params_from_torch(before)
    ours = shell.from_torch(theirs)
    assert all(module.training for module in theirs.modules())
    assert before.keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in theirs.state_dict().items())
    expected = torch_call(theirs.eval(), input)
    for one, other in zip(jax.tree.leaves(ours(input)), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@needs_torch
@pytest.mark.parametrize("shell", SHELLS)
def test_from_torch_does_not_drop_what_else_a_subclass_has(shell: Any) -> None:
    class GRU(torch.nn.GRU):
        def __init__(self) -> None:
            super().__init__(3, 5)
            self.norm = torch.nn.BatchNorm1d(5)  # With a number of batches, an integer.

    with pytest.raises(ValueError, match=r'Unexpected key.*"norm\.bias", .*"norm\.weight"'):
        shell.from_torch(GRU())


@needs_torch
@pytest.mark.parametrize("shell", SHELLS)
def test_from_torch_does_not_take_what_others_have_left(shell: Any) -> None:
    """Where some other library makes the weights, an attribute may be of any call before."""
    theirs = torch.nn.GRUCell(3, 5)
    for name in [*theirs.state_dict()]:
        weight = getattr(theirs, name)
        delattr(theirs, name)
        theirs.register_parameter(f"{name}_raw", weight)
        setattr(theirs, name, weight.detach() * 2)
    with pytest.raises(
        ValueError, match=r'Missing .*"weight_ih"(?s:.*)Unexpected .*"weight_ih_raw"'
    ):
        shell.from_torch(theirs)


@needs_torch
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_from_torch_refuses_quantised_modules() -> None:
    from torch.ao.nn import quantizable
    from torch.ao.nn.quantized import dynamic, reference

    quantised = [quantizable.LSTM, dynamic.LSTM, dynamic.GRU, reference.GRU]
    for kind in [*quantised, dynamic.LSTMCell, dynamic.GRUCell, dynamic.RNNCell]:
        ours = getattr(seqjax.nnx, kind.__name__)
        for from_torch in (seqjax.linen.from_torch, ours.from_torch):
            message = f"got: {kind.__module__}.{kind.__name__}, which is quantised: give the module"
            with pytest.raises(TypeError, match=re.escape(message)):
                from_torch(kind(3, 5))


@needs_torch
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_from_torch_names_the_layers_inside_a_model() -> None:
    gru = torch.nn.GRU(3, 5)
    model = torch.nn.ModuleDict({"encoder": torch.nn.Sequential(torch.nn.Linear(3, 3), gru)})
    model["cell"] = torch.nn.LSTMCell(3, 5)
    for wrapped, names in [
        (model, "encoder.1"),
        (torch.nn.DataParallel(gru), "module"),
        (torch.compile(gru), "_orig_mod"),
    ]:
        with pytest.raises(TypeError, match=f"inside, give one of them: {names}$"):
            seqjax.nnx.GRU.from_torch(wrapped)
    with pytest.raises(TypeError, match=r"give one of them: encoder\.1, cell$"):
        seqjax.linen.from_torch(model)
    with pytest.raises(TypeError, match=r"got: type$"):
        seqjax.linen.from_torch(torch.nn.GRU)


@needs_torch
@pytest.mark.parametrize("shell", SHELLS)
def test_tensors_without_numbers_and_of_several_dtypes(shell: Any) -> None:
    meta = torch.nn.GRU(3, 5, device="meta")
    loads = [params_from_torch, shell.make(Config("GRU", **SIZES)).load]
    for load in [lambda _: shell.from_torch(meta), *loads]:
        with pytest.raises(
            ValueError, match=r'"weight_ih_l0" cannot be read .*meta tensor; no data'
        ):
            load(meta.state_dict())
    for convert in (torch.Tensor.to_sparse, lambda tensor: tensor.to(torch.float8_e4m3fn)):
        state_dict = {
            name: convert(tensor) for name, tensor in torch.nn.GRU(3, 5).state_dict().items()
        }
        for load in loads:
            with pytest.raises(
                ValueError, match=r"cannot be read .*: load or convert it in PyTorch"
            ):
                load(state_dict)
    mixed = torch.nn.GRU(3, 5)
    mixed.bias_ih_l0.data = mixed.bias_ih_l0.data.half()
    with pytest.raises(ValueError, match=r"bias_ih_l0 float16.* module.to\(dtype\)"):
        shell.from_torch(mixed)


@needs_torch
def test_parameters_are_tensors_too() -> None:
    """`named_parameters` gives what requires a gradient."""
    theirs = torch_module_of(CONFIGS["gru"])
    expected = {name: weight.numpy() for name, weight in theirs.state_dict().items()}
    assert_equal(params_to_torch(params_from_torch(dict(theirs.named_parameters()))), expected)


@needs_torch
def test_packed_sequences_are_told_what_to_be() -> None:
    padded, lengths = torch.ones(4, 2, 3), torch.tensor([4, 2])
    packed = torch.nn.utils.rnn.pack_padded_sequence(padded, lengths)
    gru = seqjax.GRUCell(3, 5)
    recurrent = seqjax.linen.Recurrent(gru)
    calls = {
        "xs": lambda: seqjax.scan(gru, gru.init(jax.random.key(0)), packed),
        "Recurrent: input": lambda: recurrent.init(jax.random.key(0), packed),
    }
    for shell in SHELLS:
        for name in ("lstm", "gru_cell"):
            module = shell.make(CONFIGS[name])
            calls[f"{CONFIGS[name].kind}: input"] = lambda module=module: module(packed)
    for what, call in calls.items():
        message = (
            f"{what} should be an array, got: PackedSequence. Pass the padded batch and lengths="
        )
        with pytest.raises(TypeError, match=message):
            call()
    # As the message says.
    theirs = torch_module_of(CONFIGS["gru"])
    padded, lengths = torch.nn.utils.rnn.pad_packed_sequence(packed)
    output, _ = seqjax.nnx.GRU.from_torch(theirs)(padded.numpy(), lengths=lengths.numpy())
    expected, _ = torch.nn.utils.rnn.pad_packed_sequence(theirs(packed)[0])
    np.testing.assert_allclose(output, expected.detach(), rtol=0, atol=1e-6)


# Imports


@pytest.mark.parametrize("module", ["seqjax", "seqjax.interop"])
def test_imports_neither_torch_nor_flax(module: str) -> None:
    check = f"import sys, {module}; print([m for m in ('torch', 'flax') if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_flax_shells_do_not_import_torch() -> None:
    check = "import sys, seqjax.nnx, seqjax.linen; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
