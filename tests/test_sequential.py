"""Modules in Flax's `Sequential`, which spreads a tuple over the arguments of what follows."""

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_inputs
from flax import linen as nn
from flax import nnx
from shells import LAYERS, SHELLS, assert_same, build

import seqjax
import seqjax.linen
import seqjax.nnx
from seqjax.output_and_state import OutputAndState

T, BATCH = 5, 2
X = random_inputs((T, BATCH, 3))
KEY = jax.random.key(0)
KINDS = [*LAYERS, "Recurrent"]
MESSAGE = (
    "expected an array, got the pair that a recurrent module gives back.*"
    r"one `Recurrent\(Stack\(\[\.\.\.\]\)\)`"
)

shells = pytest.mark.parametrize("shell", SHELLS)
kinds = pytest.mark.parametrize("kind", KINDS)


def recurrent(shell: str, kind: str) -> Any:
    """A module from 3 features to 3."""
    args = (seqjax.LSTMCell(3, 3),) if kind == "Recurrent" else (3, 3)
    if shell == "linen":
        return getattr(seqjax.linen, kind)(*args)
    return getattr(seqjax.nnx, kind)(*args, rngs=nnx.Rngs(0))


def run(shell: str, modules: list[Any], x: jax.Array) -> Any:
    if shell == "linen":
        return nn.Sequential(modules).init_with_output(KEY, x)[0]
    return nnx.Sequential(*modules)(x)


def linear(shell: str) -> Any:
    return nn.Dense(2) if shell == "linen" else nnx.Linear(3, 2, rngs=nnx.Rngs(0))


class TestSequential:
    @shells
    @kinds
    def test_a_state_never_becomes_the_next_layers(self, shell, kind):
        with pytest.raises(TypeError, match=MESSAGE):
            run(shell, [recurrent(shell, kind), recurrent(shell, kind)], X)

    def test_nor_through_a_transform(self):
        remade = nn.remat(seqjax.linen.GRU)
        with pytest.raises(TypeError, match=MESSAGE):
            run("linen", [remade(3, 3), remade(3, 3)], X)

    @shells
    @kinds
    def test_before_a_head(self, shell, kind):
        with pytest.raises(TypeError, match=MESSAGE):
            run(shell, [recurrent(shell, kind), linear(shell)], X)

    @pytest.mark.parametrize(
        "follows",
        [
            jax.nn.relu,
            jnp.tanh,
            np.asarray,
            nnx.Dropout(0.5, rngs=nnx.Rngs(0)),
            nnx.LayerNorm(3, rngs=nnx.Rngs(0)),
            nnx.Conv(3, 3, 3, rngs=nnx.Rngs(0)),
        ],
        ids=["relu", "tanh", "NumPy", "dropout", "norm", "convolution"],
    )
    def test_before_whatever_reads_an_array(self, follows):
        with pytest.raises(TypeError, match=MESSAGE):
            run("nnx", [recurrent("nnx", "GRU"), follows], X)

    @shells
    def test_what_the_message_says_to_do(self, shell):
        """No output depends on an input to come, in layers one after the other and a head."""
        stack = seqjax.Stack([seqjax.GRUCell(3, 3), seqjax.GRUCell(3, 3)])
        made = build(shell, "Recurrent", stack).module
        if shell == "linen":
            model = nn.Sequential([made, lambda pair: pair[0], nn.Dense(2)])
            call = model.bind(model.init(KEY, X))
        else:
            call = nnx.Sequential(made, lambda pair: pair[0], linear("nnx"))
        first, later = (jax.jacobian(lambda x, t=t: call(x)[t].sum())(X) for t in (0, T - 1))
        assert (first[1:] == 0).all()
        assert (jnp.abs(later).max((1, 2)) > 0).all()

    @shells
    @pytest.mark.parametrize("kind", LAYERS)
    def test_as_the_last_of_it(self, shell, kind):
        made = recurrent(shell, kind)
        output, state = run(shell, [lambda x: 2 * x, made], X)
        assert output.shape == (T, BATCH, 3)
        assert jax.tree.leaves(state)[0].shape == (1, BATCH, 3)

    @shells
    @pytest.mark.parametrize("kind", ["RNNCell", "GRUCell"])
    def test_cells_of_one_state_chain(self, shell, kind):
        """Each gives back one array: what is read by the next."""
        made = [build(shell, kind, 3, 3, seed=seed) for seed in (0, 1)]
        if shell == "linen":
            variables = {f"layers_{i}": m.params for i, m in enumerate(made)}
            got = nn.Sequential([m.module for m in made]).apply({"params": variables}, X[0])
        else:
            got = run("nnx", [m.module for m in made], X[0])
        assert_same(got, made[1](made[0](X[0])))

    @shells
    def test_two_lstm_cells(self, shell):
        cells = [recurrent(shell, "LSTMCell") for _ in range(2)]
        with pytest.raises(TypeError, match=r"hx should be a tuple of two arrays \(h_0, c_0\)"):
            run(shell, cells, X[0])

    @shells
    def test_encoder_and_decoder(self, shell):
        """A state given on purpose, by position."""
        encoder, decoder = (build(shell, "LSTM", 3, 3, seed=seed) for seed in (0, 1))
        state = encoder(X)[1]
        assert_same(decoder(X, state), decoder(X, hx=tuple(state)), 0)
        assert (decoder(X, state)[0] != decoder(X)[0]).any()


class TestPair:
    """What a module gives back for a sequence, in place of a tuple."""

    def pair(self) -> Any:
        return build("nnx", "LSTM", 3, 3)(X)

    def test_unpacks_and_indexes(self):
        pair = self.pair()
        output, (h, c) = pair
        assert (output.shape, h.shape, c.shape) == ((T, BATCH, 3), (1, BATCH, 3), (1, BATCH, 3))
        assert pair[0] is output
        assert pair[-1] is pair[1]
        assert pair[::-1] == (pair[1], output)
        assert len(pair) == 2
        assert not isinstance(pair, tuple)
        match pair:
            case matched, _:
                assert matched is output

    def test_compares_as_a_tuple(self):
        assert OutputAndState(1, 2) == (1, 2) == OutputAndState(1, 2)
        assert OutputAndState(1, 2) != (2, 1)

    def test_is_a_pytree_with_the_paths_of_a_tuple(self):
        pair = self.pair()
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(pair)]
        assert paths == [path for path, _ in jax.tree_util.tree_leaves_with_path(tuple(pair))]
        doubled = jax.tree.map(lambda leaf: 2 * leaf, pair)
        assert isinstance(doubled, OutputAndState)
        np.testing.assert_array_equal(doubled[0], 2 * pair[0])

    @pytest.mark.parametrize(
        "again", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))]
    )
    def test_copies(self, again):
        pair = self.pair()
        assert isinstance(again(pair), OutputAndState)
        assert_same(again(pair), pair, 0)

    def test_axes_of_its_entries(self):
        """`tuple` gives what a prefix of axes is compared with."""
        made = build("nnx", "GRU", 3, 3, batch_first=True).module
        x = X.swapaxes(0, 1)
        got = jax.vmap(lambda x: tuple(made(x)), out_axes=(0, 1))(x)
        assert_same(got, made(x))

    def test_exports(self):
        made = build("linen", "GRU", 3, 3)
        exported = jax.export.export(jax.jit(made.__call__))(X)
        again = jax.export.deserialize(exported.serialize())
        assert_same(again.call(X), made(X))
        assert isinstance(again.call(X), OutputAndState)

    def test_transforms_of_linen_modules(self):
        """The layers of a deep model in one loop: the output is the carry."""
        scanned = nn.scan(
            seqjax.linen.GRU, length=2, variable_axes={"params": 0}, split_rngs={"params": True}
        )(3, 3)
        (output, states), variables = scanned.init_with_output(KEY, X)
        expected = X
        for index in range(2):
            params = jax.tree.map(lambda leaf, i=index: leaf[i], variables["params"])
            expected, state = seqjax.linen.GRU(3, 3).apply({"params": params}, expected)
            np.testing.assert_allclose(states[index], state, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)
