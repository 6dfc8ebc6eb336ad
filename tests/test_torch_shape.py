"""What PyTorch's arguments mean, in both Flax shells: checks, layouts, states, lengths, dtypes."""

import dataclasses
import operator
import warnings
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_inputs, random_like, random_params
from shells import (
    CELLS,
    LAYERS,
    SHELLS,
    LeakyCell,
    Model,
    assert_same,
    build,
    differ,
    first,
    lstm_like,
    reference,
)

import seqjax
import seqjax.linen
import seqjax.nnx
from seqjax import torch_shape
from seqjax.interop import torch_modules
from seqjax.module_arguments import LayerArguments
from seqjax.parameter_names import params_from_dict

T, BATCH = 6, 4
LENGTHS = np.array([4, 6, 0, 1])
EVERY_STEP = np.full(BATCH, T)

shells = pytest.mark.parametrize("shell", SHELLS)
layers = pytest.mark.parametrize("kind", LAYERS)
cells = pytest.mark.parametrize("kind", CELLS)

# Two layers each, so that what one layer hands to the next shows.
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn": ("RNN", {}),
    "rnn_relu_bidirectional": ("RNN", {"nonlinearity": "relu", "bidirectional": True}),
    "lstm": ("LSTM", {}),
    "lstm_bidirectional": ("LSTM", {"bidirectional": True}),
    "lstm_proj_bidirectional": ("LSTM", {"proj_size": 2, "bidirectional": True}),
    "gru_no_bias": ("GRU", {"bias": False}),
    "gru_bidirectional": ("GRU", {"bidirectional": True}),
}
configurations = pytest.mark.parametrize("name", CONFIGURATIONS)


def configured(shell: str, name: str, **options: Any) -> Model:
    kind, arguments = CONFIGURATIONS[name]
    return build(shell, kind, 3, 5, **({"num_layers": 2} | arguments | options))


def inputs(*shape: int, seed: int = 2, dtype: Any = jnp.float32) -> jax.Array:
    return random_inputs(shape, seed, dtype)


def states(made: Model, x: Any = None, **options: Any) -> Any:
    """Random initial states: other numbers in the shapes that the module itself gives back."""
    x = inputs(T, BATCH, 3) if x is None else x
    _, state = jax.eval_shape(lambda: made(x, **options))
    return random_like(state, seed=7)


def core_params(made: Model) -> Any:
    return params_from_dict(made.layer, made.params)


class TestShapes:
    """All of them without running anything."""

    @shells
    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            ("RNN", {}),
            ("RNN", {"num_layers": 3, "batch_first": True}),
            ("GRU", {"bidirectional": True}),
            ("GRU", {"num_layers": 3, "bidirectional": True, "batch_first": True}),
            ("LSTM", {"batch_first": True}),
            ("LSTM", {"num_layers": 3}),
            ("LSTM", {"proj_size": 2}),
            ("LSTM", {"num_layers": 3, "proj_size": 2, "bidirectional": True}),
            ("LSTM", {"num_layers": 3, "proj_size": 2, "bidirectional": True, "batch_first": True}),
        ],
    )
    def test_of_output_and_state(self, shell, kind, options):
        made = build(shell, kind, 3, 5, **options)
        directions, size = 1 + options.get("bidirectional", False), options.get("proj_size", 5)
        count = options.get("num_layers", 1) * directions

        def check(leading: tuple[int, ...], batch: tuple[int, ...]) -> None:
            sizes = [size, 5] if lstm_like(kind) else [size]
            leaves = [jax.ShapeDtypeStruct((count, *batch, n), jnp.float32) for n in sizes]
            state = tuple(leaves) if lstm_like(kind) else leaves[0]
            x = jax.ShapeDtypeStruct((*leading, 3), jnp.float32)
            output, got = jax.eval_shape(made, x, state)
            assert output.shape == (*leading, directions * size)
            assert got == state
            assert jax.eval_shape(made, x) == (output, state)

        check((BATCH, T) if options.get("batch_first") else (T, BATCH), (BATCH,))
        check((T,), ())  # One sequence: batch_first changes nothing.

    @shells
    @cells
    @pytest.mark.parametrize("batch_shape", [(), (4,)])
    def test_of_cells(self, shell, kind, batch_shape):
        made = build(shell, kind, 3, 5)
        x = inputs(*batch_shape, 3)
        got = made(x, made(x))
        expected = [(*batch_shape, 5)] * (2 if lstm_like(kind) else 1)
        assert [leaf.shape for leaf in jax.tree.leaves(got)] == expected

    @shells
    @layers
    def test_attributes(self, shell, kind):
        """Those of PyTorch's modules, by their names there."""
        arguments = {
            "input_size": 3, "hidden_size": 5, "num_layers": 2, "bias": False,
            "batch_first": True, "dropout": 0.25, "bidirectional": True,
        }  # fmt: skip
        arguments |= {"RNN": {"nonlinearity": "relu"}, "LSTM": {"proj_size": 2}, "GRU": {}}[kind]
        module = build(shell, kind, **arguments).module
        assert {name: getattr(module, name) for name in arguments} == arguments

    @shells
    @layers
    def test_attributes_by_default(self, shell, kind):
        module = build(shell, kind, 3, 5).module
        defaults = {
            "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0,
            "bidirectional": False,
        }  # fmt: skip
        defaults |= {"RNN": {"nonlinearity": "tanh"}, "LSTM": {"proj_size": 0}, "GRU": {}}[kind]
        assert {name: getattr(module, name) for name in defaults} == defaults

    @shells
    @cells
    def test_attributes_of_cells(self, shell, kind):
        module = build(shell, kind, 3, 5, False).module
        assert (module.input_size, module.hidden_size, module.bias) == (3, 5, False)
        if kind == "RNNCell":
            assert module.nonlinearity == "tanh"
            assert build(shell, kind, 3, 5, True, "relu").module.nonlinearity == "relu"

    @shells
    def test_positional_order_is_pytorchs(self, shell):
        positional = (3, 5, 2, False, True, 0.25, True)
        names = (
            "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout",
            "bidirectional", "proj_size",
        )  # fmt: skip
        lstm = build(shell, "LSTM", *positional, 2).module
        assert tuple(getattr(lstm, name) for name in names) == (*positional, 2)
        gru = build(shell, "GRU", *positional).module
        assert tuple(getattr(gru, name) for name in names[:-1]) == positional
        rnn = build(shell, "RNN", *positional[:3], "relu", *positional[3:]).module
        assert tuple(getattr(rnn, name) for name in names[:-1]) == positional
        assert rnn.nonlinearity == "relu"


class TestNumbers:
    @configurations
    @shells
    def test_equal_loops_over_rows_and_steps(self, shell, name):
        """The one test of every rule at once: order of states, lengths, directions, layers."""
        made = configured(shell, name)
        x, hx = inputs(T, BATCH, 3), states(made)
        mask = np.arange(T)[:, None] < LENGTHS
        # NaN in the padding must not show.
        got = made(jnp.where(mask[..., None], x, jnp.nan), hx, lengths=LENGTHS)
        expected = reference(made.layer, core_params(made), np.asarray(x), hx, mask)
        assert_same(got, expected, 2e-6)

    @configurations
    def test_equal_in_both_shells(self, name):
        nnx, linen = (configured(shell, name) for shell in SHELLS)
        assert_same(nnx.params, linen.params, 0)
        x, hx = inputs(T, BATCH, 3), states(nnx)
        assert_same(nnx(x, hx, lengths=LENGTHS), linen(x, hx, lengths=LENGTHS), 0)

    @cells
    def test_of_cells_equal_in_both_shells(self, kind):
        nnx, linen = (build(shell, kind, 3, 5) for shell in SHELLS)
        assert_same(nnx.params, linen.params, 0)
        x = inputs(BATCH, 3)
        assert_same(nnx(x, nnx(x)), linen(x, linen(x)), 0)

    @configurations
    @shells
    def test_state_index_is_layer_times_directions_plus_direction(self, shell, name):
        made = configured(shell, name)
        output, state = made(inputs(T, BATCH, 3), lengths=EVERY_STEP)
        h_n = first(state)
        if not made.module.bidirectional:
            np.testing.assert_array_equal(h_n[1], output[-1])
            return
        # Of the last layer: forward ends at the last step, backward at the first.
        size = output.shape[-1] // 2
        np.testing.assert_array_equal(h_n[2], output[-1, :, :size])
        np.testing.assert_array_equal(h_n[3], output[0, :, size:])

    @configurations
    @shells
    def test_every_initial_state_matters(self, shell, name):
        made = configured(shell, name)
        x, hx = inputs(T, BATCH, 3), states(made)
        output, _ = made(x, hx, lengths=EVERY_STEP)
        leaves, structure = jax.tree.flatten(hx)
        for which, leaf in enumerate(leaves):
            for index in range(len(leaf)):
                changed = [*leaves[:which], leaf.at[index].add(0.5), *leaves[which + 1 :]]
                got, _ = made(x, jax.tree.unflatten(structure, changed), lengths=EVERY_STEP)
                assert differ(got, output), (which, index)

    @shells
    @pytest.mark.parametrize("name", ["lstm", "gru_no_bias"])
    def test_state_goes_on_where_it_stopped(self, shell, name):
        made = configured(shell, name)
        x = inputs(T, BATCH, 3)
        whole, expected = made(x)
        head, state = made(x[:4])
        tail, got = made(x[4:], state)
        assert_same((jnp.concatenate([head, tail]), got), (whole, expected))

    @shells
    @pytest.mark.parametrize(("layer", "cell"), list(zip(LAYERS, CELLS, strict=True)))
    def test_loop_of_cell_equals_layer(self, shell, layer, cell):
        made = build(shell, layer, 3, 5)
        one = build(shell, cell, 3, 5)
        one.params = made.params["layers_0"]
        x, hx = inputs(T, BATCH, 3), states(made)
        expected, final = made(x, hx)
        state = jax.tree.map(lambda s: s[0], hx)
        outputs = []
        for t in range(T):
            state = one(x[t], state)
            outputs.append(first(state))
        assert_same(jnp.stack(outputs), expected)
        assert_same(jax.tree.map(lambda s: s[None], state), final)


class TestLayouts:
    @configurations
    @shells
    def test_batch_first_transposes_output_only(self, shell, name):
        made, transposed = configured(shell, name), configured(shell, name, batch_first=True)
        x, hx = inputs(T, BATCH, 3), states(made)
        output, state = made(x, hx, lengths=LENGTHS)
        got = transposed(x.swapaxes(0, 1), hx, lengths=LENGTHS)
        assert_same(got, (output.swapaxes(0, 1), state))

    @shells
    @pytest.mark.parametrize("name", ["lstm_proj_bidirectional", "gru_no_bias"])
    @pytest.mark.parametrize("batch_first", [False, True])
    def test_one_sequence_is_one_row(self, shell, name, batch_first):
        made = configured(shell, name)
        alone = configured(shell, name, batch_first=batch_first)
        x, hx = inputs(T, BATCH, 3), states(made)
        output, state = made(x, hx, lengths=LENGTHS)
        for row in (0, 2):
            of_row = operator.itemgetter((slice(None), row))
            got = alone(x[:, row], jax.tree.map(of_row, hx), lengths=LENGTHS[row])
            assert_same(got, (output[:, row], jax.tree.map(of_row, state)))

    @shells
    @pytest.mark.parametrize("name", ["lstm_proj_bidirectional", "gru_no_bias"])
    def test_vmap_over_rows_equals_batch(self, shell, name):
        made = configured(shell, name)
        x, hx = inputs(T, BATCH, 3), states(made)
        expected = made(x, hx, lengths=LENGTHS)
        over_rows = jax.vmap(lambda x, hx, n: made(x, hx, lengths=n), (1, 1, 0), 1)
        got = over_rows(x, hx, jnp.asarray(LENGTHS))
        assert_same(got, expected)


class TestMasks:
    @configurations
    @shells
    def test_lengths_are_a_mask(self, shell, name):
        made = configured(shell, name)
        x, hx = inputs(T, BATCH, 3), states(made)
        mask = np.arange(T)[:, None] < LENGTHS
        assert_same(made(x, hx, mask=mask), made(x, hx, lengths=LENGTHS), 0)

    @shells
    @pytest.mark.parametrize("name", ["lstm_proj_bidirectional", "gru_no_bias"])
    @pytest.mark.parametrize("batch_first", [False, True])
    def test_any_pattern(self, shell, name, batch_first):
        """Left padding, gaps, nothing and everything, in the input's layout."""
        made = configured(shell, name, batch_first=batch_first)
        hx = states(configured(shell, name))
        x = inputs(T, BATCH, 3)
        mask = np.array(
            [[0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], bool
        ).T
        output, state = reference(made.layer, core_params(made), np.asarray(x), hx, mask)
        if batch_first:
            got = made(x.swapaxes(0, 1), hx, mask=mask.T)
            assert_same(got, (output.swapaxes(0, 1), state), 2e-6)
        else:
            assert_same(made(x, hx, mask=mask), (output, state), 2e-6)

    @shells
    @pytest.mark.parametrize("batch_first", [False, True])
    def test_of_one_sequence(self, shell, batch_first):
        made = configured(shell, "lstm_bidirectional", batch_first=batch_first)
        x, mask = inputs(T, 3), np.array([0, 1, 1, 0, 1, 0], bool)
        output, state = made(x, mask=mask)
        expected, final = made(x[mask])
        assert_same((output[mask], state), (expected, final))
        np.testing.assert_array_equal(output[~mask], 0)

    @pytest.mark.parametrize(
        ("shell", "name"),
        [
            ("nnx", "rnn_relu_bidirectional"),
            ("nnx", "gru_no_bias"),
            ("linen", "lstm_proj_bidirectional"),
        ],
    )
    def test_padding_reaches_no_gradient(self, shell, name):
        made = configured(shell, name)
        mask = np.arange(T)[:, None] < LENGTHS
        x, hx = inputs(T, BATCH, 3), states(made)

        def loss(params: Any, x: Any, hx: Any) -> jax.Array:
            output, state = made.apply(params, x, hx, lengths=LENGTHS)
            leaves = [output, *jax.tree.leaves(state)]
            return sum(jnp.sum(leaf * inputs(*leaf.shape, seed=9)) for leaf in leaves)

        garbage = jnp.where(mask[..., None], x, jnp.nan)
        gradients = jax.jit(jax.grad(loss, (0, 1, 2)))
        got, expected = gradients(made.params, garbage, hx), gradients(made.params, x, hx)
        assert_same(got, expected, 0)
        np.testing.assert_array_equal(got[1][~mask], 0)
        assert np.asarray(got[1] != 0)[mask].any(-1).all()

    @shells
    def test_output_keeps_the_inputs_steps(self, shell):
        """PyTorch cuts the tail that no row reaches."""
        output, _ = configured(shell, "gru_no_bias")(inputs(T, 2, 3), lengths=np.array([2, 1]))
        assert output.shape == (T, 2, 5)


class TestDropout:
    def made(self, shell: str, kind: str = "LSTM", dropout: float = 0.5, **options: Any) -> Model:
        return build(shell, kind, 3, 5, 2, dropout=dropout, **options)

    @shells
    def test_between_layers_only(self, shell):
        made, x = self.made(shell), inputs(T, BATCH, 3)
        calm, calm_state = made(x)
        output, state = made(x, dropout_key=jax.random.key(1))
        h_n, calm_h_n = first(state), first(calm_state)
        # Not on the input and not on the state of the first layer,
        np.testing.assert_allclose(h_n[0], calm_h_n[0], rtol=1e-6, atol=1e-6)
        # but between the layers,
        assert differ(output, calm)
        # and not on the last output, which is where the last state comes from.
        np.testing.assert_array_equal(output[-1], h_n[1])
        assert (output != 0).all()

    @shells
    def test_mask_and_scale(self, shell):
        """A second layer that passes its input on shows what it was given, of both directions."""
        made = build(shell, "RNN", 3, 32, 2, "relu", dropout=0.25, bidirectional=True)
        halves = jnp.split(jnp.eye(64), 2, axis=1)
        nothing = {"w_hh": jnp.zeros((32, 32)), "b_ih": jnp.zeros(32), "b_hh": jnp.zeros(32)}
        passing = {
            "forward": {"w_ih": halves[0], **nothing},
            "backward": {"w_ih": halves[1], **nothing},
        }
        made.params = made.params | {"layers_1": passing}
        x = inputs(T, BATCH, 3)
        below, _ = made(x)
        given, _ = made(x, dropout_key=jax.random.key(1))
        active, kept = np.asarray(below > 0), np.asarray(given > 0)
        np.testing.assert_allclose(given[kept], below[kept] / 0.75, rtol=1e-5)
        for half in np.split(np.where(active, kept, np.nan), 2, axis=-1):
            deviation = np.sqrt(0.25 * 0.75 / (~np.isnan(half)).sum())
            assert abs(np.nanmean(half) - 0.75) < 5 * deviation
            # Drawn afresh for every step and row.
            for one, other in ((half[0], half[1]), (half[:, 0], half[:, 1])):
                both = ~np.isnan(one) & ~np.isnan(other)
                assert (one[both] != other[both]).any()

    @shells
    def test_of_everything(self, shell):
        """p = 1: the second layer sees zeros; nothing is NaN, gradients neither."""
        made, x = self.made(shell, "GRU", dropout=1), inputs(T, BATCH, 3)
        got, state = made(x, dropout_key=jax.random.key(1))
        second = build(shell, "GRU", 5, 5)
        second.params = {"layers_0": made.params["layers_1"]}
        expected, final = second(jnp.zeros((T, BATCH, 5)))
        assert_same(got, expected)
        assert_same(state[1:], final)

        @jax.jit
        @jax.grad
        def gradient(params: Any) -> jax.Array:
            return made.apply(params, x, dropout_key=jax.random.key(1))[0].sum()

        gradients = gradient(made.params)
        chex.assert_tree_all_finite(gradients)
        np.testing.assert_array_equal(gradients["layers_0"]["w_ih"], 0)

    @shells
    @layers
    def test_of_nothing(self, shell, kind):
        assert not self.made(shell, kind, 0.0).layer.draws_dropout
        with pytest.warns(UserWarning, match="dropout option"):
            assert not build(shell, kind, 3, 5, dropout=0.9).layer.draws_dropout

    @shells
    def test_draws_depend_on_the_key_alone(self, shell):
        made, x = self.made(shell), inputs(T, BATCH, 3)
        one, same, other = (made(x, dropout_key=jax.random.key(seed))[0] for seed in (1, 1, 2))
        np.testing.assert_array_equal(one, same)
        assert differ(one, other)

    @shells
    def test_with_lengths(self, shell):
        made, x = self.made(shell), inputs(T, BATCH, 3)
        output, state = made(x, lengths=LENGTHS, dropout_key=jax.random.key(1))
        mask = np.arange(T)[:, None] < LENGTHS
        np.testing.assert_array_equal((output != 0).all(-1), mask)
        np.testing.assert_array_equal(first(state)[1, 0], output[3, 0])


class TestRecurrent:
    """Any layer of the core as a module."""

    LAYERS: ClassVar[dict[str, seqjax.Layer]] = {
        "cell": seqjax.LSTMCell(3, 5, proj_size=2),
        "stack": seqjax.Stack([seqjax.LSTMCell(3, 5), seqjax.GRUCell(5, 4)]),
        "bidirectional": seqjax.Bidirectional(seqjax.LSTMCell(3, 5), seqjax.RNNCell(3, 4)),
        "custom": LeakyCell(3, 5),
        "custom_inside": seqjax.Stack(
            [seqjax.Bidirectional(LeakyCell(3, 5), seqjax.GRUCell(3, 2)), LeakyCell(7, 4)]
        ),
    }
    every = pytest.mark.parametrize("name", LAYERS)
    batches = pytest.mark.parametrize(
        ("name", "batch_shape"),
        [
            ("cell", (2, 3)),
            ("stack", ()),
            ("stack", (2, 3)),
            ("bidirectional", (2, 3)),
            ("custom", (2, 3)),
            ("custom_inside", (4,)),
            ("custom_inside", ()),
        ],
    )

    def carry(self, layer: seqjax.Layer, batch_shape: tuple[int, ...]) -> Any:
        return random_like(jax.eval_shape(lambda: layer.initial_carry(batch_shape)), seed=5)

    @batches
    @shells
    def test_is_the_cores_scan(self, shell, name, batch_shape):
        layer = self.LAYERS[name]
        made = build(shell, "Recurrent", layer)
        x, carry = inputs(T, *batch_shape, 3), self.carry(layer, batch_shape)
        lengths = T - 1 - np.arange(np.prod(batch_shape, dtype=int)).reshape(batch_shape)
        mask = seqjax.lengths_to_mask(lengths, T)
        final, expected = seqjax.scan(layer, core_params(made), x, carry, mask=mask)
        assert_same(made(x, carry, lengths=lengths), (expected, final), 0)
        assert_same(made(x, carry, mask=mask), (expected, final), 0)
        assert differ(made(x, mask=mask)[0], expected)

    @batches
    @shells
    def test_batch_first(self, shell, name, batch_shape):
        layer = self.LAYERS[name]
        made = build(shell, "Recurrent", layer)
        transposed = build(shell, "Recurrent", layer, batch_first=True)
        x, carry = inputs(T, *batch_shape, 3), self.carry(layer, batch_shape)
        mask = np.random.default_rng(0).random((T, *batch_shape)) < 0.5
        output, final = made(x, carry, mask=mask)
        got = transposed(jnp.moveaxis(x, 0, -2), carry, mask=np.moveaxis(mask, 0, -1))
        assert_same(got, (jnp.moveaxis(output, 0, -2), final))

    @shells
    @pytest.mark.parametrize("name", ["stack", "custom"])
    def test_carry_goes_on_where_it_stopped(self, shell, name):
        made, x = build(shell, "Recurrent", self.LAYERS[name]), inputs(T, BATCH, 3)
        whole, expected = made(x)
        head, carry = made(x[:2])
        tail, got = made(x[2:], carry)
        assert_same((jnp.concatenate([head, tail]), got), (whole, expected))

    @shells
    @pytest.mark.parametrize("name", ["stack", "custom"])
    def test_no_steps(self, shell, name):
        layer = self.LAYERS[name]
        carry = self.carry(layer, (4,))
        output, final = build(shell, "Recurrent", layer)(inputs(0, 4, 3), carry)
        assert output.shape == (0, 4, layer.output_size)
        assert_same(final, carry, 0)

    @shells
    def test_dropout(self, shell):
        layer = seqjax.Stack([LeakyCell(3, 5), seqjax.GRUCell(5, 5)], dropout=0.5)
        made, x = build(shell, "Recurrent", layer), inputs(T, BATCH, 3)
        output, _ = made(x)
        dropped, _ = made(x, dropout_key=jax.random.key(1))
        assert differ(output, dropped)

    @every
    def test_equal_in_both_shells(self, name):
        nnx, linen = (build(shell, "Recurrent", self.LAYERS[name]) for shell in SHELLS)
        assert_same(nnx.params, linen.params, 0)
        assert_same(nnx(inputs(T, BATCH, 3)), linen(inputs(T, BATCH, 3)), 0)


class TestDtypes:
    """`dtype` is what is computed in, `param_dtype` what the weights are kept in."""

    sixteen_bits = pytest.mark.parametrize(
        ("kind", "dtype"), [("LSTM", "bfloat16"), ("LSTM", "float16"), ("GRU", "bfloat16")]
    )

    @shells
    @sixteen_bits
    def test_computes_in_16_bits_with_float32_weights(self, shell, kind, dtype):
        made = build(shell, kind, 3, 5, dtype=jnp.dtype(dtype))
        x = inputs(T, BATCH, 3)
        output, state = made(x)
        assert output.dtype == first(state).dtype == dtype
        if lstm_like(kind):
            assert state[1].dtype == jnp.float32  # Rounding c at every step would lose updates.
        assert {leaf.dtype for leaf in jax.tree.leaves(made.params)} == {jnp.dtype("float32")}
        expected, _ = build(shell, kind, 3, 5)(x)
        rounding = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(output.astype(jnp.float32), expected, atol=8 * rounding)
        assert (output.astype(jnp.float32) != expected).any()
        # The state goes in as it came out, and in float32.
        again, _ = made(x, state)
        from_float32, _ = made(x, jax.tree.map(lambda s: s.astype(jnp.float32), state))
        np.testing.assert_array_equal(again, from_float32)

    @shells
    @sixteen_bits
    def test_state_goes_on_where_it_stopped(self, shell, kind, dtype):
        """Bit for bit: an LSTM's c is not rounded on its way out and in."""
        made = build(shell, kind, 3, 5, dtype=jnp.dtype(dtype))
        x = inputs(T, BATCH, 3)
        _, expected = made(x)
        _, state = made(x[:3])
        _, got = made(x[3:], state)
        assert_same(got, expected, 0)

    @shells
    @sixteen_bits
    def test_keeps_weights_in_16_bits(self, shell, kind, dtype):
        made = build(shell, kind, 3, 5, param_dtype=jnp.dtype(dtype))
        assert {leaf.dtype for leaf in jax.tree.leaves(made.params)} == {jnp.dtype(dtype)}
        x = inputs(T, BATCH, 3, dtype=dtype)
        output, state = made(x)
        assert output.dtype == first(state).dtype == dtype
        assert_same(made(x, state), made(x, jax.tree.map(lambda s: s.astype(dtype), state)), 1e-2)
        with pytest.raises(ValueError, match=f"float32.*does not match weight dtype.*{dtype}"):
            made(inputs(T, BATCH, 3))
        with pytest.raises(ValueError, match=f"state dtype.*float32.*does not match.*{dtype}"):
            made(x, jax.tree.map(lambda s: s.astype(jnp.float32), state))

    @shells
    @pytest.mark.parametrize("kind", ["LSTM", "GRU"])
    def test_computes_in_float32_with_16_bit_weights(self, shell, kind):
        made = build(shell, kind, 3, 5, dtype=jnp.float32, param_dtype=jnp.bfloat16)
        output, state = made(inputs(T, BATCH, 3, dtype="bfloat16"))
        assert {leaf.dtype for leaf in jax.tree.leaves((output, state))} == {jnp.dtype("float32")}

    @shells
    def test_float64(self, x64, shell):
        made = build(shell, "LSTM", 3, 5, param_dtype=jnp.float64)
        x = inputs(T, BATCH, 3, dtype="float64")
        got = made(x, states(made, x))
        assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("float64")}
        narrow = build(shell, "LSTM", 3, 5, dtype=jnp.float32, param_dtype=jnp.float64)
        narrow.params = made.params
        output, _ = narrow(x, states(made, x))
        np.testing.assert_allclose(output, got[0], atol=1e-5)
        assert output.dtype == jnp.float32
        assert (output.astype(jnp.float64) != got[0]).any()

    @shells
    @cells
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_of_cells(self, shell, kind, dtype):
        made = build(shell, kind, 3, 5, dtype=dtype)  # A name is as good as a dtype.
        state = made(inputs(BATCH, 3))
        assert first(state).dtype == dtype
        if lstm_like(kind):
            assert state[1].dtype == jnp.float32
        assert_same(made(inputs(BATCH, 3), state), made(inputs(BATCH, 3).astype(dtype), state), 0)

    @pytest.mark.parametrize(
        ("shell", "dtype", "param_dtype"),
        [
            ("linen", None, "float32"),
            ("nnx", "bfloat16", "float32"),
            ("linen", "float32", "float16"),
        ],
    )
    def test_of_gradients_is_that_of_weights(self, shell, dtype, param_dtype):
        made = build(shell, "GRU", 3, 5, dtype=dtype, param_dtype=jnp.dtype(param_dtype))
        x = inputs(T, BATCH, 3, dtype=param_dtype)

        def loss(params: Any, x: jax.Array) -> jax.Array:
            return made.apply(params, x)[0].astype(jnp.float32).sum()

        gradients, of_input = jax.jit(jax.grad(loss, (0, 1)))(made.params, x)
        assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(param_dtype)}
        assert of_input.dtype == param_dtype
        assert all((leaf != 0).any() for leaf in jax.tree.leaves(gradients))

    @shells
    def test_lstm_takes_c_in_the_inputs_dtype_or_as_it_is_kept(self, shell):
        made = build(shell, "LSTM", 3, 5, param_dtype=jnp.bfloat16)
        x = inputs(T, BATCH, 3, dtype="bfloat16")
        h, c = random_like(jax.eval_shape(lambda: made(x)[1]), seed=3)
        assert c.dtype == jnp.float32
        rounded = c.astype(jnp.bfloat16)
        got, _ = made(x, (h, rounded))
        expected, _ = made(x, (h, rounded.astype(jnp.float32)))
        np.testing.assert_array_equal(got, expected)
        made(x, (h, c))


class TestTracing:
    @shells
    @pytest.mark.parametrize("kind", ["LSTM", "Recurrent"])
    def test_once_for_every_shape(self, shell, kind):
        if kind == "Recurrent":
            made = build(shell, kind, LeakyCell(3, 5))
        else:
            made = build(shell, kind, 3, 5)
        x = inputs(T, BATCH, 3)
        hx = states(made, x, lengths=LENGTHS)
        chex.clear_trace_counter()

        @jax.jit
        @chex.assert_max_traces(n=1)
        def call(params: Any, x: jax.Array, hx: Any, lengths: jax.Array) -> Any:
            return made.apply(params, x, hx, lengths=lengths)

        _, state = call(made.params, x, hx, jnp.asarray(LENGTHS))
        other = jax.tree.map(lambda p: p + 1, made.params)
        call(other, inputs(T, BATCH, 3, seed=8), state, jnp.asarray(LENGTHS[::-1]))
        with pytest.raises(AssertionError, match="traced > 1"):
            call(made.params, inputs(T + 1, BATCH, 3), hx, jnp.asarray(LENGTHS))

    @shells
    def test_once_outside_jit(self, shell):
        """A call that nobody compiled neither traces nor compiles its loop again."""
        traces = []

        @dataclasses.dataclass(frozen=True)
        class CountingCell(LeakyCell):
            def step(self, params: Any, carry: Any, x: jax.Array) -> Any:
                traces.append(None)
                return super().step(params, carry, x)

        made = build(shell, "Recurrent", CountingCell(3, 5))
        _, carry = made(inputs(T, BATCH, 3))
        made(inputs(T, BATCH, 3), carry, lengths=LENGTHS)
        count = len(traces)
        assert count > 0
        made(inputs(T, BATCH, 3, seed=8), carry, lengths=LENGTHS[::-1].copy())
        made(inputs(T, BATCH, 3, seed=9))
        assert len(traces) == count


class TestConstructorChecks:
    """When several arguments are wrong, PyTorch's first complaint is ours."""

    WRONG = (
        ({"dropout": 2}, "dropout should be a number in range"),
        ({"bias": 1}, "bias should be of type bool"),
        ({"batch_first": 1}, "batch_first should be of type bool"),
        ({"input_size": 3.0}, "input_size should be of type int"),
        ({"input_size": 0}, "input_size must be greater than zero"),
        ({"hidden_size": 5.0}, "hidden_size should be of type int"),
        ({"hidden_size": 0}, "hidden_size must be greater than zero"),
        ({"num_layers": 0}, "num_layers must be greater than zero"),
    )
    WRONG_LSTM = (
        *WRONG,
        ({"proj_size": -1}, "proj_size should be a positive integer or zero"),
        ({"proj_size": 9}, "proj_size has to be smaller than hidden_size"),
    )

    @shells
    @layers
    def test_order(self, shell, kind):
        wrong = self.WRONG_LSTM if lstm_like(kind) else self.WRONG
        for index, (_, message) in enumerate(wrong):
            arguments = {"input_size": 3, "hidden_size": 5, "num_layers": 2}
            for change, _ in reversed(wrong[index:]):
                arguments |= change
            with pytest.raises((TypeError, ValueError), match=message):
                build(shell, kind, **arguments)

    @shells
    def test_nonlinearity_is_looked_at_first(self, shell):
        with pytest.raises(ValueError, match="Unknown nonlinearity 'sigmoid'"):
            build(shell, "RNN", 3, 0, nonlinearity="sigmoid", dropout=2)

    @shells
    @layers
    def test_the_warning_comes_before_later_errors(self, shell, kind):
        with (
            pytest.raises(TypeError, match="bias should be of type bool"),
            pytest.warns(UserWarning, match="dropout option"),
        ):
            build(shell, kind, 3, 5, dropout=0.5, bias=1)

    @shells
    @layers
    def test_no_warning_without_dropout(self, shell, kind):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            build(shell, kind, 3, 5, dropout=0)

    @pytest.mark.parametrize("size", [0, -1])
    def test_sizes_are_looked_at_before_a_cell_is_made(self, size):
        with pytest.raises(ValueError, match=f"hidden_size must be greater than zero, got: {size}"):
            LayerArguments(3, size)._check()


class TestBuildStack:
    def test_one_direction(self):
        layer = torch_shape.build_stack(seqjax.GRUCell(3, 5), 3, 0.25, False)
        cells = [seqjax.GRUCell(3, 5), seqjax.GRUCell(5, 5), seqjax.GRUCell(5, 5)]
        assert layer == seqjax.Stack(cells, dropout=0.25)

    def test_two_directions_with_projection(self):
        cells = [seqjax.LSTMCell(size, 5, proj_size=2) for size in (3, 4)]
        layer = torch_shape.build_stack(cells[0], 2, 0.0, True)
        both = (seqjax.Bidirectional(cell, cell) for cell in cells)
        assert layer == seqjax.Stack(list(both))
        assert (layer.input_size, layer.output_size) == (3, 4)

    def test_is_hashable_and_equal_to_its_like(self):
        build = torch_shape.build_stack.__wrapped__  # Not the same one, kept.
        one, other = (build(seqjax.RNNCell(3, 5), 2, 0.5, True) for _ in range(2))
        assert one is not other
        assert one == other
        assert hash(one) == hash(other)
        assert one != dataclasses.replace(other.layers[0])

    @shells
    @configurations
    def test_is_what_the_modules_hold(self, shell, name):
        module = configured(shell, name, dropout=0.25).module
        layer = module.layer
        assert isinstance(layer, seqjax.Stack)
        assert layer.dropout == 0.25
        assert len(layer.layers) == 2
        assert all(
            isinstance(entry, seqjax.Bidirectional) == module.bidirectional
            for entry in layer.layers
        )

    @shells
    @pytest.mark.parametrize("name", ["lstm_proj_bidirectional", "rnn"])
    def test_runs_in_the_core_with_the_modules_parameters(self, shell, name):
        made, x = configured(shell, name), inputs(T, BATCH, 3)
        _, ys = seqjax.scan(made.layer, core_params(made), x)
        np.testing.assert_array_equal(made(x)[0], ys)


class TestTorchModules:
    """Reading the configuration of PyTorch's modules off their attributes and class names."""

    def torch_class(self, name: str, *bases: type) -> type:
        return type(name, bases, {"__module__": "torch.nn.modules.rnn"})

    def test_kind(self):
        base = self.torch_class("RNNBase")
        lstm, gru = self.torch_class("LSTM", base)(), self.torch_class("GRU", base)()
        assert torch_modules.torch_kind(lstm, ["RNN", "LSTM", "GRU"]) == "LSTM"
        assert torch_modules.torch_kind(gru, ["RNN", "LSTM", "GRU"]) == "GRU"

    def test_kind_of_a_users_subclass(self):
        class MyModel(self.torch_class("LSTM")):
            pass

        assert torch_modules.torch_kind(MyModel(), ["LSTM"]) == "LSTM"

    def test_cell_is_not_its_layer(self):
        cell = self.torch_class("LSTMCell", self.torch_class("RNNCellBase"))()
        assert torch_modules.torch_kind(cell, ["LSTM", "LSTMCell"]) == "LSTMCell"
        with pytest.raises(TypeError, match=r"expected a torch.nn.LSTM, got: LSTMCell"):
            torch_modules.torch_kind(cell, ["LSTM"])

    @pytest.mark.parametrize("other", [object(), 5, None, "LSTM"])
    def test_other_kinds(self, other):
        message = rf"expected a torch.nn.RNN or torch.nn.GRU, got: {type(other).__name__}"
        with pytest.raises(TypeError, match=message):
            torch_modules.torch_kind(other, ["RNN", "GRU"])

    @pytest.mark.parametrize("shell", [seqjax.nnx, seqjax.linen], ids=SHELLS)
    @pytest.mark.parametrize(
        ("kind", "names"),
        [
            ("RNN", "input_size hidden_size num_layers nonlinearity bias batch_first dropout "
                    "bidirectional"),
            ("LSTM", "input_size hidden_size num_layers bias batch_first dropout bidirectional "
                     "proj_size"),
            ("GRU", "input_size hidden_size num_layers bias batch_first dropout bidirectional"),
            ("RNNCell", "input_size hidden_size bias nonlinearity"),
            ("LSTMCell", "input_size hidden_size bias"),
            ("GRUCell", "input_size hidden_size bias"),
        ],
    )  # fmt: skip
    def test_arguments(self, shell, kind, names):
        module = self.torch_class(kind)()
        # What PyTorch's modules have besides must not get in.
        module.mode, module.training, module.dtype = "LSTM", True, "float32"
        for index, name in enumerate(names.split()):
            setattr(module, name, index)
        module.state_dict = lambda: {"weight_ih": np.zeros((5, 3), np.float16)}
        module.modules, module._forward_pre_hooks = lambda: [module], {}
        got = torch_modules.torch_arguments(module, getattr(shell, kind))
        expected = {name: index for index, name in enumerate(names.split())}
        assert got == expected | {"param_dtype": np.float16}


class TestApply:
    """The three functions under the modules, called without Flax."""

    OPTIONS: ClassVar[dict[str, Any]] = {
        "lengths": None, "mask": None, "key": None, "dtype": None, "implementation": None,
        "remat": False,
    }  # fmt: skip

    def test_stack(self):
        layer = torch_shape.build_stack(seqjax.LSTMCell(3, 5), 2, 0.0, True)
        params, x = random_params(layer), inputs(T, BATCH, 3)
        output, state = torch_shape.apply_stack(
            "Name", layer, params, x, None, batch_first=False, **self.OPTIONS
        )
        carry, ys = seqjax.scan(layer, params, x)
        expected = [cell for entry in carry for cell in entry]
        np.testing.assert_array_equal(output, ys)
        np.testing.assert_array_equal(state[0], jnp.stack([cell.h for cell in expected]))
        np.testing.assert_array_equal(state[1], jnp.stack([cell.c for cell in expected]))
        assert type(state) is tuple

    def test_stack_says_the_name(self):
        layer = torch_shape.build_stack(seqjax.GRUCell(3, 5), 1, 0.0, False)
        with pytest.raises(ValueError, match="Name: Expected input to be 2D or 3D, got 1D"):
            torch_shape.apply_stack(
                "Name", layer, random_params(layer), inputs(3), None,
                batch_first=False, **self.OPTIONS,
            )  # fmt: skip

    def test_rank_of_state_is_looked_at_before_features(self):
        """As in PyTorch, where the rank of hx is checked outside `check_input`."""
        layer = torch_shape.build_stack(seqjax.GRUCell(3, 5), 1, 0.0, False)
        with pytest.raises(ValueError, match="hx should also be 3-D"):
            torch_shape.apply_stack(
                "GRU", layer, random_params(layer), inputs(T, BATCH, 7), inputs(1, 5),
                batch_first=False, **self.OPTIONS,
            )  # fmt: skip

    def test_recurrent(self):
        layer = seqjax.GRUCell(3, 5)
        params, x, h = random_params(layer), inputs(T, BATCH, 3), inputs(BATCH, 5)
        output, carry = torch_shape.apply_recurrent(
            "Name", layer, params, x, h, batch_first=False, **self.OPTIONS
        )
        expected, ys = seqjax.scan(layer, params, x, h)
        assert_same((output, carry), (ys, expected), 0)

    @pytest.mark.parametrize("cell", [seqjax.LSTMCell(3, 5), seqjax.GRUCell(3, 5)])
    def test_cell(self, cell):
        params, x = random_params(cell), inputs(BATCH, 3)
        got = torch_shape.apply_cell("Name", cell, params, x, None, dtype=None)
        carry, _ = jax.jit(cell.step)(params, cell.initial_carry((BATCH,)), x)
        assert_same(got, tuple(carry) if isinstance(carry, tuple) else carry, 0)
        again = torch_shape.apply_cell("Name", cell, params, x, got, dtype=None)
        assert differ(first(again), first(got))

    @pytest.mark.parametrize("cell", [seqjax.LSTMCell(3, 5), seqjax.GRUCell(3, 5)])
    def test_cell_computes_in_dtype(self, cell):
        params, x = random_params(cell), inputs(BATCH, 3)
        state = torch_shape.apply_cell("Name", cell, params, x, None, dtype=jnp.bfloat16)
        assert first(state).dtype == jnp.bfloat16
        assert jax.tree.leaves(state)[-1].dtype == (
            jnp.float32 if isinstance(cell, seqjax.LSTMCell) else jnp.bfloat16
        )
