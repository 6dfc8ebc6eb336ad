"""What Flax NNX does with modules: state, transforms, modes, dropout, training, nesting."""

import copy
import pickle
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import random_inputs, random_like
from flax import nnx
from shells import (
    CELLS,
    LeakyCell,
    assert_same,
    build,
    differ,
    first,
)

import seqjax
import seqjax.linen
import seqjax.nnx

T, BATCH = 6, 4
X = random_inputs((T, BATCH, 3))

graph_and_tree = pytest.mark.parametrize("graph", [True, False], ids=["graph", "tree"])


def module(kind: str = "LSTM", *args: Any, **options: Any) -> Any:
    """Of two layers, with random weights."""
    return build("nnx", kind, *(args or (3, 5, 2)), **options).module


def with_dropout(**options: Any) -> Any:
    return module("LSTM", 3, 5, 2, dropout=0.5, **options)


def paths(state: Any) -> set[str]:
    return {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}


class TestState:
    """What is among the saved variables."""

    def test_paths(self):
        expected = {
            f"layers_{index}/{direction}/{name}"
            for index in range(2)
            for direction in ("forward", "backward")
            for name in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
        }
        assert paths(nnx.state(module(proj_size=2, bidirectional=True))) == expected
        assert paths(nnx.state(module("GRU", 3, 5, bias=False))) == {
            "layers_0/w_ih",
            "layers_0/w_hh",
        }
        assert paths(nnx.state(module("RNNCell", 3, 5))) == {"w_ih", "w_hh", "b_ih", "b_hh"}

    @pytest.mark.parametrize(
        "arguments",
        [
            ("LSTM", (3, 5, 2), {"proj_size": 2, "bidirectional": True}),
            ("RNN", (3, 5, 2), {"bias": False}),
            ("GRU", (3, 5), {}),
            ("LSTMCell", (3, 5), {}),
            ("Recurrent", (seqjax.GRUCell(3, 5),), {}),
            ("Recurrent", (seqjax.Stack([LeakyCell(3, 5), seqjax.GRUCell(5, 4)]),), {}),
        ],
    )
    def test_paths_are_those_of_linen(self, arguments):
        kind, args, options = arguments
        drawn = nnx.eval_shape(
            lambda: getattr(seqjax.nnx, kind)(*args, **options, rngs=nnx.Rngs(0))
        )
        x = X[0] if kind.endswith("Cell") else X
        made = getattr(seqjax.linen, kind)(*args, **options)
        expected = jax.eval_shape(made.init, jax.random.key(0), x)["params"]
        got = nnx.to_pure_dict(nnx.state(drawn, nnx.Param))
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)

    def test_all_variables_are_parameters_without_dropout(self):
        for made in (
            module(),
            module(dropout=0.0),
            module("LSTMCell", 3, 5),
            module("Recurrent", seqjax.GRUCell(3, 5)),
        ):
            kinds = {type(variable) for _, variable in nnx.to_flat_state(nnx.state(made))}
            assert kinds == {nnx.Param}
            assert getattr(made, "rngs", None) is None

    def test_no_random_state_where_dropout_has_no_effect(self):
        with pytest.warns(UserWarning, match="dropout option"):
            made = module("GRU", 3, 5, dropout=0.5)
        assert paths(nnx.state(made)) == paths(nnx.state(made, nnx.Param))

    def test_random_state_of_dropout_is_no_parameter(self):
        made = with_dropout()
        random_state = nnx.state(made, nnx.RngState)
        assert paths(random_state) == {"rngs/key", "rngs/count"}
        assert paths(nnx.state(made, nnx.Param)) == paths(nnx.state(module()))
        assert paths(nnx.state(made)) == paths(random_state) | paths(nnx.state(made, nnx.Param))
        # Of its own: what the caller draws later changes nothing here, and the other way round.
        rngs = nnx.Rngs(params=0, dropout=1)
        made = seqjax.nnx.LSTM(3, 5, 2, dropout=0.5, rngs=rngs)
        before = int(rngs.dropout.count[...])
        made(X)
        assert (int(rngs.dropout.count[...]), int(made.rngs.count[...])) == (before, 1)
        assert made.rngs is not rngs.dropout

    def test_weights_and_dropout_come_from_their_streams(self):
        def drawn(**seeds: int) -> tuple[Any, jax.Array]:
            made = seqjax.nnx.GRU(3, 5, 2, dropout=0.5, rngs=nnx.Rngs(**seeds))
            return nnx.to_pure_dict(nnx.state(made, nnx.Param)), made(X)[0]

        params, output = drawn(params=0, dropout=0)
        same_params, other_output = drawn(params=0, dropout=1)
        chex.assert_trees_all_equal(params, same_params)
        assert differ(output, other_output)
        other_params, _ = drawn(params=1, dropout=0)
        for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(other_params), strict=True):
            assert (one != other).all()

    def test_every_array_is_drawn_on_its_own(self):
        made = seqjax.nnx.LSTM(3, 5, 2, bidirectional=True, rngs=nnx.Rngs(0))
        flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(nnx.state(made))])
        assert len(np.unique(flat)) > 0.99 * len(flat)
        assert np.abs(flat).max() <= 1 / np.sqrt(5)

    @pytest.mark.parametrize("param_dtype", ["float32", "bfloat16", "float16"])
    def test_weights_are_drawn_in_param_dtype(self, param_dtype):
        for kind in ("GRU", "LSTMCell"):
            drawn = nnx.eval_shape(
                lambda kind=kind: getattr(seqjax.nnx, kind)(
                    3, 5, dtype=jnp.float32, param_dtype=param_dtype, rngs=nnx.Rngs(0)
                )
            )
            dtypes = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(drawn))}
            assert dtypes == {jnp.dtype(param_dtype)}

    def test_dropout_needs_its_stream_and_only_then(self):
        seqjax.nnx.LSTM(3, 5, 2, rngs=nnx.Rngs(params=0))
        with pytest.raises((KeyError, AttributeError, ValueError), match="dropout"):
            seqjax.nnx.LSTM(3, 5, 2, dropout=0.5, rngs=nnx.Rngs(params=0))

    @graph_and_tree
    def test_split_to_numpy_and_merge(self, graph):
        """A checkpoint: nothing but NumPy arrays by name, into a module drawn anew."""
        made = module(bidirectional=True, proj_size=2)
        _, state = nnx.split(made, graph=graph)
        saved = jax.tree.map(np.asarray, nnx.to_pure_dict(state))
        assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(saved))
        other = seqjax.nnx.LSTM(3, 5, 2, bidirectional=True, proj_size=2, rngs=nnx.Rngs(9))
        assert differ(other(X)[0], made(X)[0])
        graphdef, blank = nnx.split(other, graph=graph)
        nnx.replace_by_pure_dict(blank, saved)
        assert_same(nnx.merge(graphdef, blank)(X), made(X), 0)

    def test_checkpoint_with_dropout_goes_on_with_the_same_draws(self):
        made = with_dropout()
        made(X)
        graphdef, params, random_state = nnx.split(made, nnx.Param, nnx.RngState)
        restored = nnx.merge(graphdef, *jax.tree.map(jnp.copy, (params, random_state)))
        assert_same(restored(X), made(X), 0)

    def test_restoring_onto_an_abstract_module(self):
        """As checkpoint libraries want it: shapes first, arrays later."""
        made = module()
        abstract = nnx.eval_shape(lambda: seqjax.nnx.LSTM(3, 5, 2, rngs=nnx.Rngs(0)))
        graphdef, state = nnx.split(abstract)
        assert all(type(leaf) is jax.ShapeDtypeStruct for leaf in jax.tree.leaves(state))
        assert_same(nnx.merge(graphdef, nnx.state(made))(X), made(X), 0)

    def test_an_abstract_module_is_looked_at(self):
        abstract = nnx.eval_shape(lambda: seqjax.nnx.LSTM(3, 5, 2, dropout=0.5, rngs=nnx.Rngs(0)))
        assert abstract.params == jax.eval_shape(abstract.layer.init, jax.random.key(0))
        assert "ShapeDtypeStruct" in repr(abstract)
        with pytest.raises(
            ValueError, match=r"no weights yet, but shapes.*\(3, 20\).*weight_ih_l0"
        ):
            abstract.torch_state_dict()
        with pytest.raises(ValueError, match="this LSTM has no weights yet"):
            abstract(X, deterministic=True)
        outputs = nnx.eval_shape(lambda made: made(X, deterministic=True), abstract)
        assert outputs[0].shape == (T, BATCH, 5)

    @pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
    @pytest.mark.parametrize(
        "arguments", [("LSTM", 3, 5, 2, True, False, 0.5, True, 2), ("GRUCell", 3, 5)]
    )
    def test_an_abstract_module_is_loaded(self, arguments, param_dtype):
        kind, *args = arguments
        made = module(*arguments)
        abstract = nnx.eval_shape(
            lambda: getattr(seqjax.nnx, kind)(*args, param_dtype=param_dtype, rngs=nnx.Rngs(0))
        )
        state_dict = made.torch_state_dict()
        with pytest.raises(ValueError, match="Missing key"):
            abstract.load_torch_state_dict({})
        abstract.load_torch_state_dict(state_dict)
        expected = jax.tree.map(lambda leaf: leaf.astype(param_dtype), made.params)
        assert_same(abstract.params, expected, 0)
        abstract.eval()
        x = X[0] if kind == "GRUCell" else X
        assert jax.tree.leaves(abstract(x.astype(param_dtype)))[0].dtype == param_dtype

    def test_dropout_of_a_loaded_abstract_module(self):
        """A state dict has no random state."""
        made = with_dropout()
        abstract = nnx.eval_shape(lambda: seqjax.nnx.LSTM(3, 5, 2, dropout=0.5, rngs=nnx.Rngs(0)))
        abstract.load_torch_state_dict(made.torch_state_dict())
        with pytest.raises(ValueError, match=r"draw dropout from.*nnx\.eval_shape: give rngs"):
            abstract(X)
        key = jax.random.key(0)
        assert_same(abstract(X, rngs=key), made(X, rngs=key), 0)

    def test_leaves_of_the_tree(self):
        """A module is a pytree of its variables' arrays, of nothing else."""
        made = module()
        leaves, structure = jax.tree.flatten(made)
        assert len(leaves) == 8
        assert_same(jax.tree.unflatten(structure, leaves)(X), made(X), 0)
        doubled = jax.tree.map(lambda leaf: 2 * leaf, made)
        assert differ(doubled(X)[0], made(X)[0])

    @pytest.mark.parametrize("make", [module, with_dropout], ids=["plain", "dropout"])
    def test_copies_and_pickles(self, make):
        made = make()
        made.eval()
        for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), nnx.clone(made)):
            assert_same(other(X), made(X), 0)

    def test_equal_configurations_have_one_graph(self):
        """Or `nnx.jit` would compile for each instance."""
        one, other = nnx.split(module(seed=0))[0], nnx.split(module(seed=1))[0]
        assert one == other
        assert hash(one) == hash(other)
        assert one != nnx.split(module(bidirectional=True))[0]

    def test_params_are_those_of_the_core(self):
        made = module(bidirectional=True)
        carry, ys = seqjax.scan(made.layer, made.params, X)
        np.testing.assert_array_equal(made(X)[0], ys)
        assert type(made.params[0]) is seqjax.BidirectionalParams
        assert not isinstance(made.params[0].forward.w_ih, nnx.Variable)
        assert made.layers_0["forward"]["w_ih"].shape == (3, 20)
        del carry

    @pytest.mark.parametrize(
        "name",
        [
            "layer",
            "params",
            "rngs",
            "deterministic",
            "batch_first",
            "dtype",
            "implementation",
            "remat",
        ],
    )
    def test_parameters_named_like_attributes(self, name):
        """Refused by name, lest they overwrite the module."""
        layer = LeakyCell(3, 5, names=(name, "dense"))
        with pytest.raises(ValueError, match=f"parameter '{name}'.*attribute of that name"):
            seqjax.nnx.Recurrent(layer, rngs=nnx.Rngs(0))

    def test_parameters_need_names(self):
        class Lone(LeakyCell):
            def init(self, key: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
                return jnp.ones((3,), dtype)

        with pytest.raises(TypeError, match=r"should be a NamedTuple, tuple or dict of arrays"):
            seqjax.nnx.Recurrent(Lone(3, 3), rngs=nnx.Rngs(0))


class TestTransforms:
    @graph_and_tree
    def test_jit(self, graph):
        made = module(bidirectional=True)
        expected = made(X, lengths=[6, 0, 2, 3])
        call = nnx.jit(lambda made, x, lengths: made(x, lengths=lengths), graph=graph)
        assert_same(call(made, X, jnp.array([6, 0, 2, 3])), expected)

    def test_jit_without_graph_updates(self):
        made = module()
        call = nnx.jit(lambda made, x: made(x), graph_updates=False)
        assert_same(call(made, X), made(X))

    @graph_and_tree
    def test_jit_compiles_once(self, graph):
        chex.clear_trace_counter()

        @nnx.jit(graph=graph)
        @chex.assert_max_traces(n=1)
        def call(made: Any, x: jax.Array, hx: Any) -> Any:
            return made(x, hx)

        one, other = module("GRU", 3, 5, seed=0), module("GRU", 3, 5, seed=1)
        _, state = call(one, X, jnp.ones((1, BATCH, 5)))
        call(one, 2 * X, state)
        call(other, X, state)

    @graph_and_tree
    def test_gradients(self, graph):
        """Of all three ways, in the paths, shapes and dtypes of the parameters."""
        made = module("GRU", 3, 5)

        def loss(made: Any) -> jax.Array:
            return (made(X)[0] ** 2).sum()

        gradients = nnx.jit(nnx.grad(loss, graph=graph), graph=graph)(made)
        value, same = nnx.jit(nnx.value_and_grad(loss, graph=graph), graph=graph)(made)
        np.testing.assert_allclose(value, loss(made), rtol=1e-6)
        graphdef, state = nnx.split(made)
        plain = jax.jit(jax.grad(lambda state: loss(nnx.merge(graphdef, state))))(state)
        plain = nnx.to_pure_dict(plain)
        for got in (gradients, same):
            assert_same(nnx.to_pure_dict(nnx.state(got)), plain)
        assert all((leaf != 0).any() for leaf in jax.tree.leaves(plain))
        chex.assert_trees_all_equal_shapes_and_dtypes(plain, nnx.to_pure_dict(state))

    def test_plain_jit_over_a_split_module(self):
        made = module()
        graphdef, state = nnx.split(made)

        @jax.jit
        def call(state: Any, x: jax.Array) -> Any:
            return nnx.merge(graphdef, state)(x)

        assert_same(call(state, X), made(X))

    def test_plain_jit_over_the_module(self):
        made = module()
        assert_same(jax.jit(lambda made, x: made(x))(made, X), made(X))

    def test_plain_vmap_over_rows(self):
        made = module(bidirectional=True)
        got = jax.vmap(lambda x: made(x), 1, 1)(X)
        assert_same(got, made(X))

    def test_vmap_over_an_ensemble(self):
        """Members with weights of their own, made and run by `nnx.vmap`."""
        keys = jax.random.split(jax.random.key(0), 3)
        members = nnx.vmap(lambda key: seqjax.nnx.GRU(3, 5, rngs=nnx.Rngs(key)))(keys)
        assert members.layers_0["w_ih"].shape == (3, 3, 15)
        outputs, _ = nnx.vmap(lambda member, x: member(x), in_axes=(0, None))(members, X)
        for index in range(3):
            member = jax.tree.map(lambda leaf, i=index: leaf[i], members)
            np.testing.assert_allclose(outputs[index], member(X)[0], rtol=1e-5, atol=1e-6)
        assert differ(outputs[0], outputs[1])

    def test_remat(self):
        made = module("GRU", 3, 5)
        remade = nnx.remat(lambda made, x: made(x)[0])
        expected = nnx.grad(lambda made: made(X)[0].sum())(made)
        got = nnx.grad(lambda made: remade(made, X).sum())(made)
        assert_same(nnx.to_pure_dict(got), nnx.to_pure_dict(expected))

    def test_made_inside_jit(self):
        """As sharded initialisation does it; `nnx.jit` returns the module."""
        made = nnx.jit(lambda: seqjax.nnx.LSTM(3, 5, 2, dropout=0.5, rngs=nnx.Rngs(0)))()
        expected = seqjax.nnx.LSTM(3, 5, 2, dropout=0.5, rngs=nnx.Rngs(0))
        for one in (made, expected):
            one.eval()
        assert_same(made(X), expected(X))

    @graph_and_tree
    def test_under_set_graph_mode(self, graph):
        with nnx.set_graph_mode(graph):
            made = with_dropout()
            calm = nnx.view(made, deterministic=True)
            expected = calm(X)
            made.eval()
            assert_same(nnx.jit(lambda made, x: made(x))(made, X), expected)
            made.train()
            dropped, _ = nnx.jit(lambda made, x: made(x))(made, X)
            assert differ(dropped, expected[0])
            assert int(made.rngs.count[...]) == 1
            assert_same(nnx.merge(*nnx.split(calm))(X), expected, 0)

    def test_tabulate(self):
        assert "LSTM" in nnx.tabulate(module(), X)

    def test_view_info(self):
        assert "deterministic: bool | None = None" in nnx.view_info(with_dropout())


class TestDropout:
    def test_training_draws_and_evaluation_does_not(self):
        made = with_dropout()
        assert differ(made(X)[0], made(X)[0])  # A module starts in training, as in PyTorch.
        made.eval()
        assert_same(made(X), made(X), 0)
        calm, _ = made(X)
        made.train()
        assert differ(made(X)[0], calm)
        assert differ(made(X)[0], made(X)[0])

    def test_evaluation_is_a_module_without_dropout(self):
        made, plain = with_dropout(), module()
        made.eval()
        assert_same(made(X), plain(X), 0)

    def test_argument_overrides_the_mode(self):
        made = with_dropout()
        calm, _ = made(X, deterministic=True)
        assert_same(made(X, deterministic=True)[0], calm, 0)
        made.eval()
        assert differ(made(X, deterministic=False)[0], calm)
        assert_same(made(X)[0], calm, 0)

    def test_evaluation_draws_no_key(self):
        made = with_dropout()
        made(X, deterministic=True)
        made.eval()
        made(X)
        assert int(made.rngs.count[...]) == 0
        made(X, deterministic=False)
        assert int(made.rngs.count[...]) == 1

    @pytest.mark.parametrize(
        "make",
        [
            lambda seed: nnx.Rngs(dropout=seed),
            lambda seed: nnx.Rngs(seed),
            lambda seed: nnx.Rngs(dropout=seed).dropout,
            lambda seed: jax.random.key(seed),
        ],
        ids=["dropout stream", "default stream", "a stream", "a key"],
    )
    def test_draws_of_the_call(self, make):
        made = with_dropout()
        one, same, other = (made(X, rngs=make(seed))[0] for seed in (1, 1, 2))
        np.testing.assert_array_equal(one, same)
        assert differ(one, other)
        assert int(made.rngs.count[...]) == 0
        if not isinstance(rngs := make(1), jax.Array):  # A stream moves on, a key does not.
            assert differ(made(X, rngs=rngs)[0], made(X, rngs=rngs)[0])

    @pytest.mark.parametrize("rngs", [7, "dropout", (1, 2)])
    def test_draws_of_something_else(self, rngs):
        message = f"rngs should be an nnx.Rngs, nnx.RngStream or a key, got: {type(rngs).__name__}"
        with pytest.raises(TypeError, match=message):
            with_dropout()(X, rngs=rngs)

    def test_view(self):
        made = with_dropout()
        calm = nnx.view(made, deterministic=True)
        assert (made.deterministic, calm.deterministic) == (False, True)
        assert_same(calm(X), made(X, deterministic=True), 0)
        # The weights are shared, not copied.
        made.layers_0["w_ih"][...] *= 2
        assert_same(calm(X), made(X, deterministic=True), 0)
        assert nnx.view(calm, deterministic=False).deterministic is False

    def test_modes_reach_modules_inside(self):
        class Model(nnx.Module):
            def __init__(self, rngs: nnx.Rngs) -> None:
                self.encoder = seqjax.nnx.GRU(3, 5, 2, dropout=0.5, rngs=rngs)
                self.cell = seqjax.nnx.GRUCell(5, 4, rngs=rngs)

            def __call__(self, x: jax.Array) -> jax.Array:
                return self.cell(self.encoder(x)[0][-1])

        made = Model(nnx.Rngs(0))
        assert differ(made(X), made(X))
        assert nnx.view(made, deterministic=True).encoder.deterministic
        made.eval()
        np.testing.assert_array_equal(made(X), made(X))

    def test_modes_of_modules_without_dropout(self):
        for made in (module("LSTMCell", 3, 5), module()):
            x = X[0] if "Cell" in type(made).__name__ else X
            expected = made(x)
            made.eval()
            made.train()
            assert_same(made(x), expected, 0)

    @graph_and_tree
    def test_under_jit_every_call_draws_anew(self, graph):
        made = with_dropout()
        call = nnx.jit(lambda made, x: made(x)[0], graph=graph)
        one, other = call(made, X), call(made, X)
        assert differ(one, other)
        assert int(made.rngs.count[...]) == 2

    @graph_and_tree
    def test_jit_draws_what_a_plain_call_draws(self, graph):
        jitted, plain = with_dropout(), with_dropout()
        got = nnx.jit(lambda made, x: made(x), graph=graph)(jitted, X)
        assert_same(got, plain(X))


class TestTraining:
    def data(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The mean of the first feature over each row's valid steps, from the last state."""
        x = X
        lengths = jnp.array([6, 3, 1, 4])
        mask = seqjax.lengths_to_mask(lengths, T)
        target = jnp.where(mask, x[..., 0], 0).sum(0) / lengths.astype(jnp.float32)
        return x, lengths, target

    @pytest.mark.parametrize(("kind", "graph"), [("LSTM", True), ("GRU", False)])
    def test_loss_falls(self, kind, graph):
        class Model(nnx.Module):
            def __init__(self, rngs: nnx.Rngs) -> None:
                self.recurrent = getattr(seqjax.nnx, kind)(3, 5, rngs=rngs)
                self.readout = nnx.Linear(5, 1, rngs=rngs)

            def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
                _, state = self.recurrent(x, lengths=lengths)
                return self.readout(first(state)[-1])[..., 0]

        x, lengths, target = self.data()
        model = Model(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.sgd(0.3, momentum=0.9), wrt=nnx.Param, graph=graph)

        @nnx.jit(graph=graph)
        def train_step(model: Model, optimizer: nnx.Optimizer) -> jax.Array:
            def loss(model: Model) -> jax.Array:
                return ((model(x, lengths) - target) ** 2).mean()

            value, gradients = nnx.value_and_grad(loss, graph=graph)(model)
            optimizer.update(model, gradients)
            return value

        losses = [float(train_step(model, optimizer)) for _ in range(40)]
        assert losses[-1] < 0.1 * losses[0]

    def test_loss_falls_with_dropout(self):
        x, lengths, target = self.data()
        made = seqjax.nnx.GRU(3, 5, 2, dropout=0.2, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(made, optax.sgd(0.3), wrt=nnx.Param)

        def loss(made: Any) -> jax.Array:
            _, h_n = made(x, lengths=lengths)
            return ((h_n[-1].mean(-1) - target) ** 2).mean()

        @nnx.jit
        def train_step(made: Any, optimizer: nnx.Optimizer) -> jax.Array:
            value, gradients = nnx.value_and_grad(loss)(made)
            optimizer.update(made, gradients)
            return value

        def evaluate() -> float:
            return float(loss(nnx.view(made, deterministic=True)))

        before = evaluate()
        for _ in range(40):
            train_step(made, optimizer)
        assert evaluate() < 0.7 * before
        assert int(made.rngs.count[...]) == 40

    def test_with_dropout_in_tree_mode(self):
        """There, gradients are of all leaves, so what is differentiated is split off first."""
        made = with_dropout()
        graphdef, params, rest = nnx.split(made, nnx.Param, ..., graph=False)

        @jax.jit
        def gradient(params: Any, rest: Any) -> Any:
            # A copy, since random state of an outer trace cannot move on in an inner one.
            return jax.grad(lambda p: nnx.merge(graphdef, p, rest, copy=True)(X)[0].sum())(params)

        gradients = nnx.to_pure_dict(gradient(params, rest))
        assert all((leaf != 0).any() for leaf in jax.tree.leaves(gradients))


class TestInside:
    def test_a_bigger_module(self):
        class Model(nnx.Module):
            def __init__(self, rngs: nnx.Rngs) -> None:
                self.layers = nnx.List(
                    [
                        seqjax.nnx.GRU(3, 5, 2, dropout=0.5, batch_first=True, rngs=rngs),
                        seqjax.nnx.GRU(5, 5, 2, dropout=0.5, batch_first=True, rngs=rngs),
                    ]
                )
                self.readout = nnx.Linear(5, 2, rngs=rngs)

            def __call__(self, x: jax.Array) -> jax.Array:
                for layer in self.layers:
                    x, _ = layer(x)
                return self.readout(x)

        made = Model(nnx.Rngs(0))
        x = X.swapaxes(0, 1)
        for graph in (True, False):  # Tree mode allows no variable in two places.
            output = nnx.jit(lambda made, x: made(x), graph=graph)(made, x)
            assert output.shape == (BATCH, T, 2)
        assert paths(nnx.state(made, nnx.RngState)) == {
            f"layers/{index}/rngs/{name}" for index in range(2) for name in ("key", "count")
        }
        keys = [jax.random.key_data(layer.rngs.key[...]) for layer in made.layers]
        assert (keys[0] != keys[1]).any()  # Two modules never drop the same.

    def test_a_linen_module(self):
        made = nnx.bridge.to_linen(seqjax.nnx.GRU, 3, 5, 2)
        variables = made.init(jax.random.key(0), X)
        output, h_n = made.apply(variables, X)
        assert (output.shape, h_n.shape) == ((T, BATCH, 5), (2, BATCH, 5))
        params = variables["params"]
        expected, _ = seqjax.linen.GRU(3, 5, 2).apply({"params": params}, X)
        np.testing.assert_allclose(output, expected, rtol=1e-6, atol=1e-6)

    def test_a_linen_module_inside_nnx(self):
        made = nnx.bridge.ToNNX(seqjax.linen.GRU(3, 5, 2), rngs=nnx.Rngs(0)).lazy_init(X)
        params = nnx.to_pure_dict(nnx.state(made, nnx.Param))
        own = build("nnx", "GRU", 3, 5, 2)
        own.params = params
        assert_same(made(X), own(X))


class TestOnline:
    def test_cells_decode_with_the_weights_of_the_layer(self):
        """One step at a time through a trained stack, in the core, under `lax.scan`."""
        made = module("GRU", 3, 5, 2)
        expected, _ = made(X)
        carry = made.layer.initial_carry((BATCH,))
        _, got = jax.lax.scan(lambda c, x: made.layer.step(made.params, c, x), carry, X)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("kind", CELLS)
    def test_a_cell_inside_scan(self, kind):
        made = module(kind, 3, 5)
        state = random_like(jax.eval_shape(made, X[0]), seed=3)
        final, outputs = jax.lax.scan(lambda s, x: (made(x, s),) * 2, state, X)
        expected = state
        for x in X:
            expected = made(x, expected)
        assert_same(final, expected)
        assert first(outputs).shape == (T, BATCH, 5)
