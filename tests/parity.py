"""One way to run a recurrent module, whichever of seqjax's interfaces it is reached through.

Everything goes in and comes out as PyTorch has it: a state dict of NumPy arrays, a time-major
input `(T, batch, features)`, states `(layers * directions, batch, size)`, and gradients under the
names of the state dict. A test compares the results with PyTorch's and never sees the interface.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import seqjax
import seqjax.linen
import seqjax.nnx

LAYER_FORMS = ("core", "core scan", "nnx", "nnx batch_first", "linen", "linen batch_first")
"""The interfaces to a whole layer; all but "core scan" choose the implementation themselves."""

CELL_FORMS = ("core", "nnx", "linen")
"""The interfaces to a single step."""

Arrays = dict[str, np.ndarray]


class Config:
    """What to build: the name of a class in `torch.nn` and its arguments.

    Args:
      kind: "RNN", "LSTM", "GRU", "RNNCell", "LSTMCell" or "GRUCell".
      arguments: keyword arguments, the same for PyTorch and for both shells.
    """

    def __init__(self, kind: str, **arguments: Any) -> None:
        self.kind = kind
        self.arguments = arguments

    def __repr__(self) -> str:
        arguments = (f", {name}={value!r}" for name, value in self.arguments.items())
        return f"Config({self.kind!r}{''.join(arguments)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    @property
    def is_cell(self) -> bool:
        return self.kind.endswith("Cell")

    @property
    def is_lstm(self) -> bool:
        return self.kind.startswith("LSTM")

    @property
    def directions(self) -> int:
        return 2 if self.arguments.get("bidirectional") else 1

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Features of each state: of h, or of h and c."""
        hidden_size = self.arguments["hidden_size"]
        h_size = self.arguments.get("proj_size") or hidden_size
        return (h_size, hidden_size) if self.is_lstm else (h_size,)

    @property
    def output_size(self) -> int:
        return self.state_sizes[0] * self.directions

    def state_shapes(self, batch_shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        if self.is_cell:
            return [(*batch_shape, size) for size in self.state_sizes]
        count = self.arguments.get("num_layers", 1) * self.directions
        return [(count, *batch_shape, size) for size in self.state_sizes]

    def torch_module(self) -> Any:
        """PyTorch's own module, in float64."""
        import torch

        return getattr(torch.nn, self.kind)(**self.arguments).double()

    def core_layer(self) -> seqjax.Layer:
        """The layer of the core, put together here and not by the shells' code."""
        arguments = dict(self.arguments)
        num_layers = arguments.pop("num_layers", 1)
        bidirectional = arguments.pop("bidirectional", False)
        input_size = arguments.pop("input_size")
        dropout = arguments.pop("dropout", 0.0)
        make = getattr(seqjax, self.kind if self.is_cell else f"{self.kind}Cell")
        if self.is_cell:
            return make(input_size, **arguments)
        layers = []
        for index in range(num_layers):
            cell = make(self.output_size if index else input_size, **arguments)
            layers.append(seqjax.Bidirectional(cell, cell) if bidirectional else cell)
        return seqjax.Stack(layers, dropout)


@dataclasses.dataclass(frozen=True)
class Data:
    """Numbers for one run; `cotangents` belong to the output, then to each final state.

    A cell has no output besides its state, and one cotangent for each state.
    """

    weights: Arrays
    input: np.ndarray
    states: tuple[np.ndarray, ...] | None
    cotangents: tuple[np.ndarray, ...]
    lengths: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Results:
    """What a run gives: values as in `Data.cotangents`, and gradients of their products' sum.

    `gradients` has every weight under its name in the state dict, `input`, and `h_0` and `c_0`
    where states were given.
    """

    values: tuple[np.ndarray, ...]
    gradients: Arrays


def run_seqjax(config: Config, form: str, data: Data, dtype: str = "float64") -> Results:
    """Values and gradients from one of seqjax's interfaces, computed in `dtype`, under jit."""
    interface = make_interface(config, form, dtype)
    outputs, gradients = interface.values_and_gradients(*_inputs(interface, data))
    of_weights, of_input, of_states = gradients
    named = {**interface.to_state_dict(of_weights), "input": of_input}
    named.update(zip(("h_0", "c_0"), of_states or (), strict=False))
    return Results(jax.tree.map(np.asarray, outputs), jax.tree.map(np.asarray, named))


def run_seqjax_forward(
    config: Config, form: str, data: Data, dtype: str = "float64"
) -> tuple[np.ndarray, ...]:
    """Values alone, outside jit: lengths are concrete, and programs are shared between forms."""
    interface = make_interface(config, form, dtype)
    weights, input, states, lengths, _ = _inputs(interface, data)
    return jax.tree.map(np.asarray, interface.values(weights, input, states, lengths))


def run_torch(config: Config, data: Data) -> Results:
    """Values and gradients from PyTorch in float64; with lengths it packs the input."""
    import torch
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    def leaf(array: np.ndarray) -> Any:
        return torch.from_numpy(array.copy()).requires_grad_()

    module = config.torch_module()
    module.load_state_dict({name: torch.from_numpy(w.copy()) for name, w in data.weights.items()})
    input = leaf(data.input)
    states = None if data.states is None else tuple(leaf(state) for state in data.states)
    hx = states if states is None or config.is_lstm else states[0]
    if config.is_cell:
        final = module(input, hx)
        outputs = final if config.is_lstm else (final,)
    else:
        if data.lengths is None:
            output, final = module(input, hx)
        else:
            lengths = torch.from_numpy(data.lengths)
            packed = pack_padded_sequence(input, lengths, enforce_sorted=False)
            packed, final = module(packed, hx)
            output, _ = pad_packed_sequence(packed, total_length=len(input))
        outputs = (output, *final) if config.is_lstm else (output, final)
    loss = sum(
        (value * torch.from_numpy(cotangent)).sum()
        for value, cotangent in zip(outputs, data.cotangents, strict=True)
    )
    loss.backward()
    gradients = {name: weight.grad for name, weight in module.named_parameters()}
    gradients["input"] = input.grad
    gradients.update(zip(("h_0", "c_0"), (state.grad for state in states or ()), strict=False))
    return Results(
        tuple(value.detach().numpy() for value in outputs),
        {name: gradient.numpy() for name, gradient in gradients.items()},
    )


@contextlib.contextmanager
def quick_compilation() -> Iterator[None]:
    """Lets XLA skip optimizations: these tests compile much and run little."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def assert_same(ours: Results, theirs: Results, tolerance: float) -> None:
    """Every value and gradient is there and agrees, relative to the array's largest number."""
    assert ours.gradients.keys() == theirs.gradients.keys()
    for index, (value, expected) in enumerate(zip(ours.values, theirs.values, strict=True)):
        assert_close(value, expected, tolerance, f"value {index}")
    for name, expected in theirs.gradients.items():
        assert_close(ours.gradients[name], expected, tolerance, f"gradient of {name}")


def assert_close(value: np.ndarray, expected: np.ndarray, tolerance: float, name: str) -> None:
    """Equal up to `tolerance` times the array's largest number, and to `tolerance` itself.

    Sums that cancel keep the error of their terms, so that a small entry of a gradient cannot be
    held to a relative tolerance of its own.
    """
    assert value.shape == expected.shape, f"{name}: {value.shape} is not {expected.shape}"
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(value, expected, rtol=0, atol=tolerance * scale, err_msg=name)


def assert_initial_distribution(weights: Arrays, hidden_size: int) -> None:
    """Each array looks drawn from U(-1/sqrt(hidden_size), 1/sqrt(hidden_size)).

    Bounds, mean, variance, and the largest distance between the two distribution functions
    (Kolmogorov and Smirnov's), each as wide as one array in 100,000 needs.
    """
    bound = 1 / math.sqrt(hidden_size)
    for name, array in weights.items():
        unit = np.sort(array.ravel().astype(np.float64)) / bound
        count = len(unit)
        assert np.abs(unit).max() <= 1 + 1e-6, name  # The bound itself may be rounded up.
        assert np.abs(unit).max() > 1 - 12 / count, name
        assert abs(unit.mean()) < 4.5 * math.sqrt(1 / 3 / count), name
        # The variance of x**2 is 1/5 - 1/9.
        assert abs(np.mean(unit**2) - 1 / 3) < 4.5 * math.sqrt(4 / 45 / count), name
        steps = np.arange(count + 1) / count
        expected = (unit + 1) / 2
        distance = max(np.max(steps[1:] - expected), np.max(expected - steps[:-1]))
        assert distance * math.sqrt(count) < 2.5, name


def random_weights(config: Config, rng: np.random.Generator) -> Arrays:
    """A state dict of normal random numbers: nothing is zero, and nothing is repeated.

    The names and shapes are written out here once more, so that they do not come from what they
    test.
    """
    arguments = config.arguments
    hidden_size, output_size = arguments["hidden_size"], config.state_sizes[0]
    rows = {"RNN": 1, "GRU": 3, "LST": 4}[config.kind[:3]] * hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(arguments.get("num_layers", 1)):
        for direction in range(config.directions):
            suffix = "" if config.is_cell else f"_l{layer}" + "_reverse" * direction
            input_size = config.output_size if layer else arguments["input_size"]
            shapes["weight_ih" + suffix] = (rows, input_size)
            shapes["weight_hh" + suffix] = (rows, output_size)
            if arguments.get("bias", True):
                shapes["bias_ih" + suffix] = shapes["bias_hh" + suffix] = (rows,)
            if arguments.get("proj_size"):
                shapes["weight_hr" + suffix] = (output_size, hidden_size)
    return {name: 0.5 * rng.standard_normal(shape) for name, shape in shapes.items()}


def random_data(
    config: Config,
    seed: int,
    steps: int | None,
    batch_shape: tuple[int, ...],
    lengths: Any = None,
    padding: tuple[float, ...] = (np.nan, np.inf, -1e30),
    with_states: bool = True,
) -> Data:
    """Random weights, input, states and cotangents; `padding` alternates in padded inputs."""
    rng = np.random.default_rng(seed)
    weights = random_weights(config, rng)
    time = () if steps is None else (steps,)
    input = rng.standard_normal((*time, *batch_shape, config.arguments["input_size"]))
    shapes = config.state_shapes(batch_shape)
    states = tuple(rng.standard_normal(shape) for shape in shapes)
    if not config.is_cell:
        shapes = [(*time, *batch_shape, config.output_size), *shapes]
    cotangents = tuple(rng.standard_normal(shape) for shape in shapes)
    if lengths is not None:
        lengths = np.asarray(lengths)
        padded = np.arange(steps)[:, None] >= lengths
        input[padded] = np.resize(padding, (padded.sum(), input.shape[-1]))
    return Data(weights, input, states if with_states else None, cotangents, lengths)


@dataclasses.dataclass(frozen=True)
class Interface:
    """A way into seqjax: weights in and out, and the call, with everything time-major."""

    dtype: str
    from_state_dict: Callable[[Arrays], Any]
    to_state_dict: Callable[[Any], Arrays]
    values: Callable[[Any, jax.Array, Any, Any], tuple[jax.Array, ...]]

    @functools.cached_property
    def values_and_gradients(self) -> Callable[..., Any]:
        """Compiled, with the lengths traced: a program serves every batch of the same shape."""

        @jax.jit
        def run(weights: Any, input: Any, states: Any, lengths: Any, cotangents: Any) -> Any:
            def values(*primals: Any) -> tuple[jax.Array, ...]:
                return self.values(*primals, lengths)

            outputs, pull_back = jax.vjp(values, weights, input, states)
            return outputs, pull_back(cotangents)

        return run


@functools.cache
def make_interface(config: Config, form: str, dtype: str) -> Interface:
    """The interface called `form`, one of `LAYER_FORMS` or `CELL_FORMS`."""
    kind, *details = form.split()
    make = {"core": _core, "nnx": _nnx, "linen": _linen}[kind]
    options = {"scan": {"implementation": "scan"}, "batch_first": {"batch_first": True}}
    return make(config, dtype, **(options[details[0]] if details else {}))


def _inputs(interface: Interface, data: Data) -> tuple[Any, ...]:
    def cast(array: np.ndarray) -> jax.Array:
        return jnp.asarray(array.astype(interface.dtype))

    return (
        interface.from_state_dict(data.weights),
        cast(data.input),
        jax.tree.map(cast, data.states),
        data.lengths,
        jax.tree.map(cast, data.cotangents),
    )


def _core(config: Config, dtype: str, implementation: str | None = None) -> Interface:
    layer = config.core_layer()

    def layer_values(params: Any, input: Any, states: Any, lengths: Any) -> Any:
        carry = None if states is None else _split(config, states)
        mask = None if lengths is None else seqjax.lengths_to_mask(lengths, len(input))
        carry, output = seqjax.scan(
            layer, params, input, carry, mask=mask, implementation=implementation
        )
        return output, *_join(config, carry)

    def cell_values(params: Any, input: Any, states: Any, lengths: Any) -> Any:
        if states is None:
            carry = layer.initial_carry(input.shape[:-1], input.dtype)
        else:
            carry = seqjax.LSTMCarry(*states) if config.is_lstm else states[0]
        carry, _ = layer.step(params, carry, input)
        return tuple(carry) if config.is_lstm else (carry,)

    return Interface(
        dtype,
        lambda state_dict: seqjax.interop.params_from_torch(state_dict, dtype),
        seqjax.interop.params_to_torch,
        cell_values if config.is_cell else layer_values,
    )


def empty_nnx_module(config: Config, **options: Any) -> Any:
    """A module of `seqjax.nnx` with zeros for weights: drawing them takes long to compile."""
    make = functools.partial(getattr(seqjax.nnx, config.kind), **config.arguments, **options)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    return nnx.merge(graph, _zeros(shapes))


def empty_linen_module(config: Config, **options: Any) -> tuple[Any, Any]:
    """A module of `seqjax.linen`, and variables of zeros."""
    module = getattr(seqjax.linen, config.kind)(**config.arguments, **options)
    sample = jnp.zeros((1, config.arguments["input_size"]), module.param_dtype)
    return module, _zeros(jax.eval_shape(module.init, jax.random.key(0), sample))


def _nnx(config: Config, dtype: str, **options: Any) -> Interface:
    module = empty_nnx_module(config, **options, param_dtype=dtype)
    graph = nnx.graphdef(module)

    def from_state_dict(state_dict: Arrays) -> Any:
        module.load_torch_state_dict(state_dict)
        return jax.tree.map(jnp.copy, nnx.state(module))

    def call(params: Any) -> Callable[..., Any]:
        return nnx.merge(graph, params)

    return Interface(
        dtype,
        from_state_dict,
        lambda gradients: call(gradients).torch_state_dict(),
        _in_torch_order(config, call, **options),
    )


def _linen(config: Config, dtype: str, **options: Any) -> Interface:
    module, empty = empty_linen_module(config, **options, param_dtype=dtype)
    return Interface(
        dtype,
        lambda state_dict: seqjax.linen.load_torch_state_dict(module, empty, state_dict),
        lambda gradients: seqjax.linen.torch_state_dict(module, gradients),
        _in_torch_order(config, lambda variables: module.bind(variables), **options),
    )


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _in_torch_order(
    config: Config, module_with: Callable[[Any], Callable[..., Any]], batch_first: bool = False
) -> Callable[..., tuple[jax.Array, ...]]:
    """A module's call as `Interface.values`; `module_with(weights)` is the module to call."""

    def values(weights: Any, input: Any, states: Any, lengths: Any) -> tuple[jax.Array, ...]:
        module = module_with(weights)
        hx = states if states is None or config.is_lstm else states[0]
        if config.is_cell:
            final = module(input, hx)
            return final if config.is_lstm else (final,)
        swapped = batch_first and input.ndim == 3
        output, final = module(jnp.swapaxes(input, 0, 1) if swapped else input, hx, lengths=lengths)
        output = jnp.swapaxes(output, 0, 1) if swapped else output
        return (output, *final) if config.is_lstm else (output, final)

    return values


def _split(config: Config, states: tuple[jax.Array, ...]) -> Any:
    """PyTorch's states as the carry of a `Stack`: layers first, then directions."""
    cells = [
        seqjax.LSTMCarry(*arrays) if config.is_lstm else arrays[0]
        for arrays in zip(*states, strict=True)
    ]
    if config.directions == 1:
        return tuple(cells)
    pairs = zip(cells[::2], cells[1::2], strict=True)
    return tuple(seqjax.BidirectionalCarry(*pair) for pair in pairs)


def _join(config: Config, carry: Any) -> tuple[jax.Array, ...]:
    cells = list(carry)
    if config.directions == 2:
        cells = [cell for pair in carry for cell in (pair.forward, pair.backward)]
    if config.is_lstm:
        return jnp.stack([cell.h for cell in cells]), jnp.stack([cell.c for cell in cells])
    return (jnp.stack(cells),)
