"""`initial_state` of the modules: what `hx=None` means, to start loops from."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_inputs
from flax import linen as nn
from flax import nnx
from shells import CELLS, LAYERS, SHELLS, LeakyCell, assert_same, build

import seqjax
import seqjax.linen
import seqjax.nnx

T, BATCH = 4, 3
SIZES = (3, 5)
STACK = seqjax.Stack([seqjax.LSTMCell(*SIZES), LeakyCell(5, 4)])
MODULES = {
    **{kind: (kind, (*SIZES, 2), {"bidirectional": True}) for kind in LAYERS},
    "projection": ("LSTM", (*SIZES, 2), {"proj_size": 2}),
    "batch_first": ("LSTM", SIZES, {"batch_first": True}),
    **{kind: (kind, SIZES, {}) for kind in CELLS},
    "Recurrent": ("Recurrent", (STACK,), {}),
}
DTYPES: dict[str, dict[str, Any]] = {
    "float32": {},
    "computes in bfloat16": {"dtype": jnp.bfloat16},
    "weights in bfloat16": {"param_dtype": jnp.bfloat16},
    "computes in float32": {"dtype": jnp.float32, "param_dtype": jnp.bfloat16},
}

shells = pytest.mark.parametrize("shell", SHELLS)


def input_dtype(dtypes: dict[str, Any]) -> Any:
    return dtypes.get("dtype", dtypes.get("param_dtype", jnp.float32))


def inputs(kind: str, batch_shape: tuple[int, ...], options: dict[str, Any], dtype: Any) -> Any:
    shape = (*batch_shape, 3) if kind in CELLS else (T, *batch_shape, 3)
    xs = random_inputs(shape).astype(dtype)
    return jnp.swapaxes(xs, 0, 1) if options.get("batch_first") and batch_shape else xs


@shells
@pytest.mark.parametrize("batch_shape", [(BATCH,), (), (0,)], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_a_call_gives_it_back(
    module: Any, dtypes: dict[str, Any], batch_shape: tuple[int, ...], shell: str
) -> None:
    """In structure, layout and dtypes; and all of it is zero."""
    kind, sizes, options = module
    if kind == "Recurrent" and input_dtype(dtypes) != jnp.float32:
        sizes = (STACK.layers[0],)  # A LeakyCell has float32 biases.
    model = build(shell, kind, *sizes, **options, **dtypes)
    x = inputs(kind, batch_shape, options, input_dtype(dtypes))
    state = model.module.initial_state(batch_shape)
    given = jax.eval_shape(lambda: model(x, state))
    assert jax.tree.map(jnp.shape, given) == jax.tree.map(jnp.shape, jax.eval_shape(model, x))
    result = given if kind in CELLS else given[1]
    kinds = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (state, result)]
    assert kinds[0] == kinds[1]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state))


@shells
@pytest.mark.parametrize("kind", ["LSTM", "GRUCell", "Recurrent"])
def test_a_call_with_it_is_one_without(kind: str, shell: str) -> None:
    kind, sizes, options = MODULES[kind]
    model = build(shell, kind, *sizes, **options)
    x = inputs(kind, (BATCH,), options, jnp.float32)
    assert_same(model(x, model.module.initial_state((BATCH,))), model(x), 0)


@shells
def test_by_itself_it_is_one_sequences(shell: str) -> None:
    h, c = build(shell, "LSTM", *SIZES, 2).module.initial_state()
    assert h.shape == c.shape == (2, 5)


@shells
@pytest.mark.parametrize("kind", [*CELLS, "LSTM"])
def test_carry_of_a_scan_in_bfloat16(kind: str, shell: str) -> None:
    """`lax.scan` refuses a carry whose type changes."""
    model = build(shell, kind, *SIZES, dtype=jnp.bfloat16)
    xs = random_inputs((T, BATCH, 3)).astype(jnp.bfloat16)

    def step(state: Any, x: jax.Array) -> tuple[Any, None]:
        return (model(x, state) if kind in CELLS else model(x[None], state)[1]), None

    state, _ = jax.lax.scan(step, model.module.initial_state((BATCH,)), xs)
    expected = None
    for x in xs:
        expected = model(x, expected) if kind in CELLS else model(x[None], expected)[1]
    assert_same(state, expected, 1e-2)


def test_weights_that_were_cast() -> None:
    """What hx=None means follows the weights, not what they were made in."""
    lstm = seqjax.nnx.LSTM(3, 5, rngs=nnx.Rngs(0))
    cast = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nnx.state(lstm, nnx.Param))
    nnx.update(lstm, cast)
    x = jnp.ones((4, BATCH, 3), jnp.bfloat16)
    assert_same(lstm(x, lstm.initial_state((BATCH,))), lstm(x), 0)


@shells
@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_start_of_generate(kind: str, shell: str) -> None:
    model = build(shell, kind, *((4, 4, 2) if kind == "LSTM" else (4, 4)), dtype=jnp.bfloat16)

    def step(state: Any, token: jax.Array) -> tuple[Any, jax.Array]:
        x = jax.nn.one_hot(token, 4, dtype=jnp.bfloat16)
        if kind == "LSTMCell":
            state = model(x, state)
            return state, state[0]
        output, state = model(x[None], state)
        return state, output[0]

    start = model.module.initial_state((BATCH,))
    axis = 1 if kind == "LSTM" else 0
    prompt = jnp.array([[0, 1, 2]])
    written = seqjax.generate(step, start, prompt, max_tokens=2, temperature=0.0, carry_axis=axis)
    state, logits = step(start, prompt[0])
    first = logits.argmax(-1)
    np.testing.assert_array_equal(written.tokens[0], first)
    np.testing.assert_array_equal(written.tokens[1], step(state, first)[1].argmax(-1))


def test_inside_of_models_that_are_tabulated() -> None:
    """`nnx.tabulate` compiles every public method that a call runs."""

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.cell = seqjax.nnx.LSTMCell(*SIZES, rngs=rngs)

        def __call__(self, x: jax.Array) -> Any:
            return self.cell(x, self.cell.initial_state(x.shape[:-1]))

    x = random_inputs((BATCH, 3))
    assert "LSTMCell" in nnx.tabulate(Model(nnx.Rngs(0)), x)

    class LinenModel(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> Any:
            cell = seqjax.linen.LSTMCell(*SIZES)
            return cell(x, cell.initial_state(x.shape[:-1]))

    assert "LSTMCell" in LinenModel().tabulate(jax.random.key(0), x)


def test_under_jit_and_with_symbolic_sizes() -> None:
    lstm = seqjax.linen.LSTM(*SIZES)
    assert_same(jax.jit(lstm.initial_state, static_argnums=0)((2,)), lstm.initial_state((2,)), 0)
    (rows,) = jax.export.symbolic_shape("rows")
    h, _ = jax.eval_shape(lambda: lstm.initial_state((rows,)))
    assert h.shape == (1, rows, 5)


@shells
@pytest.mark.parametrize("kind", ["GRU", "GRUCell", "Recurrent"])
def test_what_is_no_batch_shape(kind: str, shell: str) -> None:
    sizes = (seqjax.GRUCell(*SIZES),) if kind == "Recurrent" else SIZES
    made = build(shell, kind, *sizes).module
    with pytest.raises(TypeError, match=r"batch_shape should be a tuple, such as \(4,\).*got: 4"):
        made.initial_state(4)
    if kind == "Recurrent":
        assert made.initial_state((2, 4)).shape == (2, 4, 5)
    else:
        message = rf"{kind}: batch_shape should be \(batch,\) or \(\), got: \(2, 4\)"
        with pytest.raises(ValueError, match=message):
            made.initial_state((2, 4))


@shells
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS, "Recurrent"])
def test_help(kind: str, shell: str) -> None:
    method = getattr(getattr(seqjax, shell), kind).initial_state
    assert inspect.signature(method).parameters["batch_shape"].default == ()
    documentation = inspect.getdoc(method) or ""
    for part in ("Args:\n  batch_shape: ", "Returns:\n", "Raises:\n", ">>> "):
        assert part in documentation
