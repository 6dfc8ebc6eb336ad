"""What Flax Linen does with modules: init and apply, transforms, dropout, training, nesting."""

import copy
import pickle
from typing import Any

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import random_inputs, random_like
from flax import linen as nn
from flax.training import train_state
from shells import CELLS, LAYERS, LeakyCell, LinenModel, assert_same, build, differ, first

import seqjax
import seqjax.linen

T, BATCH = 6, 4
X = random_inputs((T, BATCH, 3))
KEY = jax.random.key(0)


def module(kind: str = "LSTM", *args: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A module of two layers and its variables, random ones."""
    made = build("linen", kind, *(args or (3, 5, 2)), **options)
    return made.module, {"params": made.params}


def with_dropout(**options: Any) -> tuple[Any, dict[str, Any]]:
    return module("LSTM", 3, 5, 2, dropout=0.5, **options)


def paths(params: Any) -> set[str]:
    return set(flax.traverse_util.flatten_dict(params, sep="/"))


class TestVariables:
    def test_paths(self):
        def init(made: nn.Module, x: jax.Array = X) -> dict[str, Any]:
            return jax.eval_shape(made.init, KEY, x)

        variables = init(seqjax.linen.LSTM(3, 5, 2, proj_size=2, bidirectional=True))
        assert set(variables) == {"params"}
        assert paths(variables["params"]) == {
            f"layers_{index}/{direction}/{name}"
            for index in range(2)
            for direction in ("forward", "backward")
            for name in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
        }
        gru = init(seqjax.linen.GRU(3, 5, bias=False))
        assert paths(gru["params"]) == {"layers_0/w_ih", "layers_0/w_hh"}
        cell = init(seqjax.linen.RNNCell(3, 5), X[0])
        assert paths(cell["params"]) == {"w_ih", "w_hh", "b_ih", "b_hh"}

    def test_shapes(self):
        lstm = seqjax.linen.LSTM(3, 5, 2, proj_size=2, bidirectional=True)
        params = jax.eval_shape(lstm.init, KEY, X)["params"]
        shapes = {"w_ih": (3, 20), "w_hh": (2, 20), "b_ih": (20,), "b_hh": (20,), "w_hr": (5, 2)}
        for direction in ("forward", "backward"):
            assert jax.tree.map(jnp.shape, params["layers_0"][direction]) == shapes
            assert jax.tree.map(jnp.shape, params["layers_1"][direction]) == shapes | {
                "w_ih": (4, 20)
            }

    def test_every_array_is_drawn_on_its_own(self):
        params = seqjax.linen.LSTM(3, 5, 2, bidirectional=True).init(KEY, X)["params"]
        flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])
        assert len(np.unique(flat)) > 0.99 * len(flat)
        assert np.abs(flat).max() <= 1 / np.sqrt(5)

    def test_depend_on_the_key_and_not_on_the_input(self):
        gru = seqjax.linen.GRU(3, 5)
        one = gru.init(KEY, X)
        chex.assert_trees_all_equal(one, gru.init(KEY, 2 * X[:2, :1]))
        other = gru.init(jax.random.key(1), X)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            assert (a != b).all()

    @pytest.mark.parametrize("param_dtype", ["float32", "bfloat16", "float16"])
    def test_dtype(self, param_dtype):
        gru = seqjax.linen.GRU(3, 5, dtype=jnp.float32, param_dtype=param_dtype)
        leaves = jax.tree.leaves(gru.init(KEY, X))
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype(param_dtype)}

    @pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
    def test_init_with_output(self, kind):
        made = getattr(seqjax.linen, kind)(3, 5)
        x = X[0] if kind in CELLS else X
        output, variables = made.init_with_output(KEY, x)
        assert_same(output, made.apply(variables, x))

    def test_init_without_arrays(self):
        """Shapes alone, as checkpoint libraries and sharding want them."""
        lstm = seqjax.linen.LSTM(3, 5, 2)
        abstract = jax.eval_shape(lstm.init, KEY, X)
        chex.assert_trees_all_equal_shapes_and_dtypes(abstract, lstm.init(KEY, X))

    def test_init_draws_each_weight_once(self):
        drawn = []

        class Counted(LeakyCell):
            def init(self, key: jax.Array, dtype: Any = jnp.float32) -> Any:
                if not isinstance(key, jax.core.Tracer):
                    drawn.append(key)
                return super().init(key, dtype)

        stack = seqjax.Stack([Counted(3, 3, (f"decay_{i}", "dense")) for i in range(3)])
        made = seqjax.linen.Recurrent(stack)
        variables = made.init(KEY, X)
        assert len(drawn) == 3
        made.apply(variables, X)
        assert len(drawn) == 3
        # What is there stays, and what is missing is drawn.
        some = {"params": {"layers_0": variables["params"]["layers_0"]}}
        _, filled = made.apply(some, X, mutable="params", rngs={"params": jax.random.key(1)})
        assert len(drawn) == 6
        chex.assert_trees_all_equal(filled["params"]["layers_0"], some["params"]["layers_0"])
        assert differ(*(v["params"]["layers_1"]["dense"]["kernel"] for v in (filled, variables)))

    def test_shapes_alone_are_loaded_but_not_written(self):
        made, variables = module()
        abstract = jax.eval_shape(made.init, KEY, X)
        with pytest.raises(ValueError, match=r"no weights yet, but shapes.*weight_ih_l0"):
            seqjax.linen.torch_state_dict(made, abstract)
        state_dict = seqjax.linen.torch_state_dict(made, variables)
        loaded = seqjax.linen.load_torch_state_dict(made, abstract, state_dict)
        chex.assert_trees_all_equal(loaded, variables)

    def test_init_under_jit(self):
        lstm = seqjax.linen.LSTM(3, 5)
        chex.assert_trees_all_close(jax.jit(lstm.init)(KEY, X), lstm.init(KEY, X), rtol=1e-6)

    def test_weights_that_do_not_fit(self):
        lstm, variables = module()
        with pytest.raises(ValueError, match=r"params layers_0/w_ih: expected shape \(3, 24\)"):
            seqjax.linen.LSTM(3, 6, 2).apply(variables, X)
        with pytest.raises(flax.errors.ScopeParamNotFoundError, match="layers_2"):
            seqjax.linen.LSTM(3, 5, 3).apply(variables, X)
        with pytest.raises(flax.errors.ScopeCollectionNotFound, match="params"):
            lstm.apply({}, X)

    def test_bytes_and_back(self):
        lstm, variables = module(bidirectional=True)
        blank = jax.tree.map(jnp.zeros_like, variables)
        restored = flax.serialization.from_bytes(blank, flax.serialization.to_bytes(variables))
        assert_same(lstm.apply(restored, X), lstm.apply(variables, X), 0)

    def test_numpy_and_back(self):
        lstm, variables = module(bidirectional=True)
        leaves, structure = jax.tree.flatten(variables)
        restored = jax.tree.unflatten(structure, [np.asarray(leaf) for leaf in leaves])
        assert_same(lstm.apply(restored, X), lstm.apply(variables, X), 0)

    def test_module_is_a_value(self):
        one, same = (seqjax.linen.LSTM(3, 5, 2, dropout=0.5) for _ in range(2))
        assert one == same
        assert hash(one) == hash(same)
        assert one != seqjax.linen.LSTM(3, 5, 2)
        assert one.copy(hidden_size=7).layer.output_size == 7
        for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            assert other == one
        assert hash(seqjax.linen.Recurrent(seqjax.GRUCell(3, 5)))

    @pytest.mark.parametrize("name", ["layer", "params", "rngs", "deterministic", "dtype"])
    def test_parameters_named_like_attributes(self, name):
        made = seqjax.linen.Recurrent(LeakyCell(3, 5, names=(name, "dense")))
        (output, _), variables = made.init_with_output(KEY, X)
        assert output.shape == (T, BATCH, 5)
        assert paths(variables["params"]) == {name, "dense/kernel", "dense/bias"}


class TestTransforms:
    def test_jit(self):
        lstm, variables = module(bidirectional=True)
        lengths = jnp.array([6, 0, 2, 3])
        call = jax.jit(lambda variables, x, n: lstm.apply(variables, x, lengths=n))
        assert_same(call(variables, X, lengths), lstm.apply(variables, X, lengths=lengths))

    def test_jit_compiles_once(self):
        chex.clear_trace_counter()
        gru, variables = module("GRU", 3, 5)

        @jax.jit
        @chex.assert_max_traces(n=1)
        def call(variables: Any, x: jax.Array, hx: Any) -> Any:
            return gru.apply(variables, x, hx)

        _, state = call(variables, X, jnp.ones((1, BATCH, 5)))
        call(jax.tree.map(jnp.ones_like, variables), 2 * X, state)

    def test_bind(self):
        lstm, variables = module()
        assert_same(lstm.bind(variables)(X), lstm.apply(variables, X), 0)

    def test_gradients(self):
        lstm, variables = module()
        gradients = jax.jit(jax.grad(lambda v: (lstm.apply(v, X)[0] ** 2).sum()))(variables)
        chex.assert_trees_all_equal_shapes_and_dtypes(gradients, variables)
        assert all((leaf != 0).any() for leaf in jax.tree.leaves(gradients))

    def test_checkpoint(self):
        """Gradients with the forward pass computed twice, by `jax.checkpoint` and `nn.remat`."""
        gru, variables = module("GRU", 3, 5)
        remade = nn.remat(seqjax.linen.GRU)(3, 5)
        calls = {
            "plain": lambda v: gru.apply(v, X)[0].sum(),
            "jax.checkpoint": jax.checkpoint(lambda v: gru.apply(v, X)[0].sum()),
            "nn.remat": lambda v: remade.apply(v, X)[0].sum(),
        }
        gradients = {name: jax.jit(jax.grad(call))(variables) for name, call in calls.items()}
        for name in ("jax.checkpoint", "nn.remat"):
            assert_same(gradients[name], gradients["plain"])

    @pytest.mark.parametrize("transform", [nn.remat, nn.jit])
    def test_deterministic_in_the_call_of_a_transformed_module(self, transform):
        """By position, so that it can be static: it decides what is computed."""
        plain, variables = with_dropout()
        made = transform(seqjax.linen.LSTM, static_argnums=(3,))(3, 5, 2, dropout=0.5)
        options = {"lengths": jnp.array([6, 0, 2, 3]), "rngs": {"dropout": KEY}}
        calm = plain.apply(variables, X, deterministic=True, **options)
        assert_same(made.apply(variables, X, None, True, **options), calm)
        assert differ(made.apply(variables, X, None, False, **options)[0], calm[0])

    def test_remat_with_dropout(self):
        """`deterministic` in the constructor, where the call has no room for it."""
        calm, variables = module()
        remade = nn.remat(seqjax.linen.LSTM)(3, 5, 2, dropout=0.5, deterministic=False)
        got, _ = remade.apply(variables, X, rngs={"dropout": KEY})
        assert differ(got, calm.apply(variables, X)[0])

    def test_nn_jit(self):
        lstm, variables = module()
        assert_same(
            nn.jit(seqjax.linen.LSTM)(3, 5, 2).apply(variables, X), lstm.apply(variables, X)
        )

    def test_plain_vmap_over_rows(self):
        lstm, variables = module(bidirectional=True)
        got = jax.vmap(lambda x: lstm.apply(variables, x), 1, 1)(X)
        assert_same(got, lstm.apply(variables, X))

    def test_capture_intermediates(self):
        lstm, variables = module()
        result, captured = lstm.apply(variables, X, capture_intermediates=True)
        assert_same(captured["intermediates"]["__call__"][0], result, 0)

    @pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
    def test_tabulate(self, kind):
        made = getattr(seqjax.linen, kind)(3, 5)
        table = made.tabulate(KEY, X[0] if kind in CELLS else X)
        assert kind in table
        assert "w_hh" in table

    def test_only_the_call_is_a_method_of_flax(self):
        """Helpers seen by Flax would run before the module is ready and fill its tables."""
        seen = []

        def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            seen.append(context.method_name)
            return call(*args, **kwargs)

        with nn.intercept_methods(note):
            seqjax.linen.RNN(3, 5).init(KEY, X)
            seqjax.linen.LSTMCell(3, 5).init(KEY, X[0])
            seqjax.linen.Recurrent(seqjax.GRUCell(3, 5)).init(KEY, X)
        assert seen == ["__call__"] * 3


class TestDropout:
    def test_draws_from_the_dropout_stream(self):
        lstm, variables = with_dropout()

        def call(seed: int) -> jax.Array:
            rngs = {"dropout": jax.random.key(seed)}
            return lstm.apply(variables, X, deterministic=False, rngs=rngs)[0]

        one, same, other = call(1), call(1), call(2)
        np.testing.assert_array_equal(one, same)
        assert differ(one, other)

    def test_deterministic_is_a_module_without_dropout(self):
        lstm, variables = with_dropout()
        plain, _ = module()
        expected = plain.apply(variables, X)
        assert_same(lstm.apply(variables, X, deterministic=True), expected, 0)
        # The stream may be there; it is not looked at.
        got = lstm.apply(variables, X, deterministic=True, rngs={"dropout": KEY})
        assert_same(got, expected, 0)

    def test_deterministic_in_the_constructor(self):
        calm, variables = with_dropout(deterministic=True)
        wild, _ = with_dropout(deterministic=False)
        expected, _ = calm.apply(variables, X)
        dropped, _ = wild.apply(variables, X, rngs={"dropout": KEY})
        assert differ(dropped, expected)

    def test_deterministic_has_to_be_given_once(self):
        lstm, variables = with_dropout()
        rngs = {"dropout": KEY}
        message = 'Parameter "deterministic" must be passed to the constructor or at call time'
        with pytest.raises(ValueError, match=message):
            lstm.apply(variables, X, rngs=rngs)
        with pytest.raises(ValueError, match=message):
            lstm.init(KEY, X)
        calm, _ = with_dropout(deterministic=True)
        with pytest.raises(ValueError, match='"deterministic" was passed to the constructor and'):
            calm.apply(variables, X, deterministic=True, rngs=rngs)

    def test_the_stream_has_to_be_given(self):
        lstm, variables = with_dropout()
        with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
            lstm.apply(variables, X, deterministic=False)

    def test_nothing_is_needed_without_dropout(self):
        for options in ({}, {"dropout": 0.0}, {"deterministic": False}):
            lstm, variables = module(**options)
            lstm.apply(variables, X)
        lstm.apply(variables, X, deterministic=None)
        with pytest.warns(UserWarning, match="dropout option"):
            one_layer, variables = module("GRU", 3, 5, dropout=0.5)
        one_layer.apply(variables, X)

    def test_draws_nothing_into_the_variables(self):
        lstm, _ = with_dropout()
        variables = lstm.init({"params": KEY, "dropout": KEY}, X, deterministic=False)
        assert set(variables) == {"params"}
        _, changed = lstm.apply(
            variables, X, deterministic=False, rngs={"dropout": KEY}, mutable=True
        )
        assert set(changed) == {"params"}
        chex.assert_trees_all_equal(changed, variables)

    def test_two_modules_of_one_parent_draw_apart(self):
        """Linen folds the path into the stream: equal weights, unequal masks."""

        class Model(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array) -> Any:
                made = [
                    seqjax.linen.LSTM(3, 5, 2, dropout=0.5, deterministic=False, name=name)
                    for name in ("a", "b")
                ]
                return [layer(x)[0] for layer in made]

        _, variables = with_dropout()
        params = {"a": variables["params"], "b": variables["params"]}
        one, other = Model().apply({"params": params}, X, rngs={"dropout": KEY})
        assert differ(one, other)


class Model(nn.Module):
    """Recurrent layers inside a model, made in the call."""

    kind: str = "LSTM"
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, lengths: Any, *, training: bool = False) -> jax.Array:
        recurrent = getattr(seqjax.linen, self.kind)(
            3, 5, 2, dropout=self.dropout, name="recurrent"
        )
        _, state = recurrent(x, lengths=lengths, deterministic=not training)
        return nn.Dense(1)(first(state)[-1])[..., 0]


class TestInside:
    def test_a_bigger_module(self):
        model = Model(dropout=0.5)
        variables = model.init(KEY, X, jnp.array([6, 0, 2, 3]))
        assert set(variables["params"]) == {"recurrent", "Dense_0"}
        assert set(variables["params"]["recurrent"]) == {"layers_0", "layers_1"}
        options = {"training": True, "rngs": {"dropout": KEY}}
        trained = model.apply(variables, X, jnp.array([6, 0, 2, 3]), **options)
        assert differ(trained, model.apply(variables, X, jnp.array([6, 0, 2, 3])))

    def test_setup(self):
        class WithSetup(nn.Module):
            def setup(self) -> None:
                self.encoder = seqjax.linen.GRU(3, 5, 2)
                self.decoder = seqjax.linen.GRUCell(5, 4)

            def __call__(self, x: jax.Array) -> jax.Array:
                output, _ = self.encoder(x)
                return self.decoder(output[-1], self.decoder(output[0]))

        variables = WithSetup().init(KEY, X)
        output = WithSetup().apply(variables, X)
        params = variables["params"]
        assert set(params) == {"encoder", "decoder"}
        encoded, _ = seqjax.linen.GRU(3, 5, 2).apply({"params": params["encoder"]}, X)
        cell = seqjax.linen.GRUCell(5, 4)
        h = cell.apply({"params": params["decoder"]}, encoded[0])
        assert_same(output, cell.apply({"params": params["decoder"]}, encoded[-1], h))

    def test_one_module_called_twice_has_one_set_of_weights(self):
        class Twice(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array) -> jax.Array:
                gru = seqjax.linen.GRU(3, 5, name="gru")
                _, state = gru(x)
                return gru(x, state)[0]

        variables = Twice().init(KEY, X)
        assert set(variables["params"]) == {"gru"}
        gru, own = seqjax.linen.GRU(3, 5), {"params": variables["params"]["gru"]}
        _, state = gru.apply(own, X)
        assert_same(Twice().apply(variables, X), gru.apply(own, X, state)[0])


class TestTraining:
    @pytest.mark.parametrize(("kind", "dropout"), [("LSTM", 0.0), ("GRU", 0.2)])
    def test_loss_falls(self, kind, dropout):
        """The mean of the first feature over each row's valid steps, from the last state."""
        x, lengths = X, jnp.array([6, 3, 1, 4])
        mask = seqjax.lengths_to_mask(lengths, T)
        target = jnp.where(mask, x[..., 0], 0).sum(0) / lengths.astype(jnp.float32)
        model = Model(kind, dropout)
        state = train_state.TrainState.create(
            apply_fn=model.apply,
            params=model.init(KEY, x, lengths)["params"],
            tx=optax.sgd(0.2, momentum=0.9),
        )

        @jax.jit
        def train_step(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            def loss(params: Any) -> jax.Array:
                output = state.apply_fn(
                    {"params": params}, x, lengths, training=True, rngs={"dropout": key}
                )
                return ((output - target) ** 2).mean()

            value, gradients = jax.value_and_grad(loss)(state.params)
            return state.apply_gradients(grads=gradients), value

        losses = []
        for key in jax.random.split(KEY, 40):
            state, value = train_step(state, key)
            losses.append(float(value))
        assert losses[-1] < 0.3 * losses[0]


class TestOnline:
    def test_decoding_with_the_weights_of_the_layer(self):
        """One step at a time through a stack, in the core, under `lax.scan`."""
        made = build("linen", "Recurrent", seqjax.Stack([seqjax.GRUCell(3, 5), LeakyCell(5, 4)]))
        assert isinstance(made, LinenModel)
        params = seqjax.parameter_names.params_from_dict(made.layer, made.params)
        carry = made.layer.initial_carry((BATCH,))
        _, got = jax.lax.scan(lambda c, x: made.layer.step(params, c, x), carry, X)
        np.testing.assert_allclose(got, made(X)[0], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("kind", CELLS)
    def test_a_cell_inside_nn_scan(self, kind):
        """Linen's own way to run a cell over time, with one set of weights for all steps."""
        cell, variables = module(kind, 3, 5)
        state = random_like(jax.eval_shape(lambda: cell.apply(variables, X[0])), seed=3)

        class Step(nn.Module):
            @nn.compact
            def __call__(self, state: Any, x: jax.Array) -> Any:
                state = getattr(seqjax.linen, kind)(3, 5, name="cell")(x, state)
                return state, first(state)

        over_time = nn.scan(Step, variable_broadcast="params", split_rngs={"params": False})()
        final, _ = over_time.apply({"params": {"cell": variables["params"]}}, state, X)
        expected = state
        for x in X:
            expected = cell.apply(variables, x, expected)
        assert_same(final, expected)
