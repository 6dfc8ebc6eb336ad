"""One way to build and call the modules of both Flax shells, always with random weights."""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import random_params
from flax import nnx

import seqjax
import seqjax.linen
import seqjax.nnx
from seqjax.ops.precision import add_bias
from seqjax.output_and_state import OutputAndState
from seqjax.parameter_names import params_to_dict

SHELLS = ("nnx", "linen")
LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")


class NnxModel:
    """A module of `seqjax.nnx` and its parameters."""

    def __init__(self, kind: str, *args: Any, **kwargs: Any) -> None:
        # Without drawing the weights, which come later: compiling that is most of the time.
        self.module = nnx.eval_shape(
            lambda: getattr(seqjax.nnx, kind)(*args, **kwargs, rngs=nnx.Rngs(0))
        )
        self.layer = self.module.layer
        if self.layer.draws_dropout:
            self.module.rngs = nnx.data(nnx.RngStream(1, tag="dropout"))

    @property
    def params(self) -> dict[str, Any]:
        """The parameters as nested dicts of arrays."""
        return nnx.to_pure_dict(nnx.state(self.module, nnx.Param))

    @params.setter
    def params(self, params: dict[str, Any]) -> None:
        nnx.update(self.module, params)

    def apply(
        self,
        params: dict[str, Any],
        *args: Any,
        dropout_key: jax.Array | None = None,
        **kwargs: Any,
    ) -> Any:
        """A pure call with other parameters, for `jax.grad` and `jax.jit`."""
        module = nnx.clone(self.module)
        nnx.update(module, params)
        if self.layer.draws_dropout:
            kwargs |= {"deterministic": dropout_key is None, "rngs": dropout_key}
        return module(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.layer.draws_dropout:
            return self.apply(self.params, *args, **kwargs)
        return self.module(*args, **kwargs)


class LinenModel:
    """A module of `seqjax.linen` and its parameters."""

    def __init__(self, kind: str, *args: Any, **kwargs: Any) -> None:
        self.module = getattr(seqjax.linen, kind)(*args, **kwargs)
        self.layer = self.module.layer
        self.params: dict[str, Any] = {}

    def apply(
        self,
        params: dict[str, Any],
        *args: Any,
        dropout_key: jax.Array | None = None,
        **kwargs: Any,
    ) -> Any:
        """A pure call with other parameters, for `jax.grad` and `jax.jit`."""
        if self.layer.draws_dropout:
            kwargs["deterministic"] = dropout_key is None
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        return self.module.apply({"params": params}, *args, rngs=rngs, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.apply(self.params, *args, **kwargs)


Model = NnxModel | LinenModel


def build(shell: str, kind: str, *args: Any, seed: int = 0, **kwargs: Any) -> Model:
    """A module with random weights, biases included, that depend on `seed` but not on `shell`."""
    model = (NnxModel if shell == "nnx" else LinenModel)(kind, *args, **kwargs)
    dtype = kwargs.get("param_dtype", jnp.float32)
    model.params = params_to_dict(random_params(model.layer, seed, dtype))
    return model


def lstm_like(kind: str) -> bool:
    """Whether the state is `(h, c)`, not `h`."""
    return kind.startswith("LSTM")


def first(state: Any) -> jax.Array:
    """`h` of a state, whether `h` or `(h, c)`."""
    return state[0] if isinstance(state, tuple) else state


def assert_same(got: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """Asserts equal structure, shapes, dtypes and, within `tolerance`, values.

    What a module gives back for a sequence stands for a tuple.
    """
    got, expected = (tuple(r) if isinstance(r, OutputAndState) else r for r in (got, expected))
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance, strict=True)


def differ(one: Any, other: Any) -> bool:
    """Whether two arrays differ clearly."""
    return float(jnp.max(jnp.abs(one - other))) > 1e-3


@dataclasses.dataclass(frozen=True)
class LeakyCell(seqjax.Cell):
    """A cell as a user writes one: `h' = decay * h + tanh(x W + b)`, with nested parameters."""

    input_size: int
    hidden_size: int
    names: tuple[str, str] = ("decay", "dense")

    @property
    def output_size(self) -> int:
        return self.hidden_size

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> dict[str, Any]:
        decay, dense = self.names
        shape = (self.input_size, self.hidden_size)
        return {
            decay: jnp.full((self.hidden_size,), 0.5, dtype),
            dense: {"kernel": jax.random.normal(key, shape, dtype), "bias": jnp.zeros(shape[1:])},
        }

    def initial_carry(self, batch_shape: tuple[int, ...] = (), dtype: Any = jnp.float32) -> Any:
        return {"h": jnp.zeros((*batch_shape, self.hidden_size), dtype)}

    def step(self, params: Any, carry: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        decay, dense = (params[name] for name in self.names)
        h = jnp.tanh(add_bias(x @ dense["kernel"], dense["bias"]))
        h += jnp.einsum("i,...i->...i", decay, carry["h"])
        return {"h": h}, h


@functools.partial(jax.jit, static_argnums=0)
def _step(cell: seqjax.Cell, params: Any, carry: Any, x: jax.Array) -> tuple[Any, jax.Array]:
    return cell.step(params, carry, x)


def reference(layer: seqjax.Stack, params: Any, xs: Any, hx: Any, mask: Any) -> tuple[Any, Any]:
    """PyTorch's layers as loops over layers, directions, rows and valid steps.

    Args:
      layer: what the arguments of a module stand for; of it only the cells are used.
      params: the parameters, as the core takes them.
      xs: `(T, batch, features)`.
      hx: initial states, stacked as PyTorch has them.
      mask: bool `(T, batch)`.

    Returns:
      `output, state`, as PyTorch has them.
    """
    finals = []
    for index, entry in enumerate(layer.layers):
        both = isinstance(entry, seqjax.Bidirectional)
        directions = [entry.forward, entry.backward] if both else [entry]
        weights = params[index] if both else [params[index]]
        outputs = []
        for direction, cell in enumerate(directions):
            output = np.zeros((*xs.shape[:2], cell.output_size), xs.dtype)
            rows = []
            for row in range(xs.shape[1]):
                start = jax.tree.map(operator.itemgetter((len(finals), row)), hx)
                carry = seqjax.LSTMCarry(*start) if isinstance(start, tuple) else start
                steps = np.flatnonzero(mask[:, row])
                for t in reversed(steps) if direction else steps:
                    carry, y = _step(cell, weights[direction], carry, xs[t, row])
                    output[t, row] = y
                rows.append(carry)
            finals.append(jax.tree.map(lambda *leaves: np.stack(leaves), *rows))
            outputs.append(output)
        xs = np.concatenate(outputs, -1)
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *finals)
    return jnp.asarray(xs), tuple(state) if isinstance(state, tuple) else state
