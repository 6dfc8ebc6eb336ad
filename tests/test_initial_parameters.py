"""Initializers given to the modules of both shells: what they draw, and Flax's boxes around it."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_inputs
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P
from shells import CELLS, LAYERS, SHELLS, LeakyCell, assert_same, differ

import seqjax
import seqjax.linen
import seqjax.nnx
from seqjax.initializers import forget_bias, orthogonal

T, BATCH = 4, 3
SIZES = (3, 4)
X = random_inputs((T, BATCH, 3))
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}
ZEROS = jax.nn.initializers.zeros
ORTHOGONAL = jax.nn.initializers.orthogonal()
WITH_PARTITIONING = {"nnx": nnx.with_partitioning, "linen": nn.with_partitioning}

shells = pytest.mark.parametrize("shell", SHELLS)


def draw(shell: str, kind: str, *args: Any, seed: int = 0, **options: Any) -> dict[str, Any]:
    """The parameters that a module starts with, as nested dicts of arrays."""
    if shell == "nnx":
        made = getattr(seqjax.nnx, kind)(*args, **options, rngs=nnx.Rngs(seed))
        return nnx.to_pure_dict(nnx.state(made, nnx.Param))
    made = getattr(seqjax.linen, kind)(*args, **options)
    x = (X[0] if kind in CELLS else X).astype(options.get("param_dtype", X.dtype))
    return nn.meta.unbox(made.init(jax.random.key(seed), x)["params"])


def calls(seen: list[Any]) -> Callable[..., jax.Array]:
    """An initializer that draws, and writes down what it is asked for."""

    def init(key: jax.Array, shape: Any, dtype: Any) -> jax.Array:
        seen.append((shape, jnp.dtype(dtype).name))
        return jax.random.normal(key, shape, dtype)

    return init


@shells
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_what_initializers_are_asked_for(kind: str, shell: str) -> None:
    gates = GATES[kind.removesuffix("Cell")]
    seen: dict[str, list[Any]] = {
        name: [] for name in ("kernel_init", "recurrent_kernel_init", "bias_init")
    }
    initializers = {name: calls(of_name) for name, of_name in seen.items()}
    draw(shell, kind, *SIZES, param_dtype="bfloat16", **initializers)
    assert seen == {
        "kernel_init": gates * [((3, 4), "bfloat16")],
        "recurrent_kernel_init": gates * [((4, 4), "bfloat16")],
        "bias_init": 2 * [((gates * 4,), "bfloat16")],
    }


@shells
def test_each_draws_its_own_weights_and_no_other(shell: str) -> None:
    """Of every layer and direction; and the others are those that there were without it."""
    of_initializer = {
        "kernel_init": {"w_ih"},
        "recurrent_kernel_init": {"w_hh", "w_hr"},
        "bias_init": {"b_ih", "b_hh"},
    }
    options: dict[str, Any] = {"proj_size": 2, "bidirectional": True}
    plain = draw(shell, "LSTM", *SIZES, 2, **options)
    for argument, names in of_initializer.items():
        initializer = {argument: jax.nn.initializers.constant(7)}
        expected = jax.tree.map_with_path(
            lambda path, leaf, names=names: (
                jnp.full_like(leaf, 7) if path[-1].key in names else leaf
            ),
            plain,
        )
        assert_same(draw(shell, "LSTM", *SIZES, 2, **options, **initializer), expected, 0)


@shells
def test_every_gate_is_orthogonal(shell: str) -> None:
    """By JAX's own initializer, and by ours in 16 bits."""
    for init, dtype, tolerance in ((ORTHOGONAL, "float32", 1e-5), (orthogonal(), "bfloat16", 2e-2)):
        params = draw(
            shell, "LSTM", *SIZES, 2, recurrent_kernel_init=init, param_dtype=dtype
        )  # fmt: skip
        gates = [
            gate
            for layer in params.values()
            for gate in np.split(np.asarray(layer["w_hh"], np.float32), 4, axis=1)
        ]
        for gate in gates:
            np.testing.assert_allclose(gate @ gate.T, np.eye(4), atol=tolerance)
        assert all(differ(gate, other) for gate in gates for other in gates if gate is not other)


@shells
def test_a_projections_weights(shell: str) -> None:
    params = draw(shell, "LSTM", *SIZES, proj_size=2, recurrent_kernel_init=ORTHOGONAL)
    weights = params["layers_0"]
    for gate in np.split(weights["w_hh"], 4, axis=1):
        np.testing.assert_allclose(gate @ gate.T, np.eye(2), atol=1e-5)
    np.testing.assert_allclose(weights["w_hr"].T @ weights["w_hr"], np.eye(2), atol=1e-5)


@shells
def test_fans_are_a_gates_own(shell: str) -> None:
    """Glorot's bound is sqrt(6 / (rows + columns)): of 30 columns, not of the 120 of all gates."""
    init = jax.nn.initializers.glorot_uniform()
    w_ih = draw(shell, "LSTMCell", 3, 30, kernel_init=init)["w_ih"]
    bound = np.sqrt(6 / 33)
    assert 0.9 * bound < np.abs(w_ih).max() <= bound


@shells
def test_every_array_is_drawn_on_its_own_and_by_the_key(shell: str) -> None:
    normal = jax.nn.initializers.normal()
    options = {"kernel_init": normal, "recurrent_kernel_init": normal, "bias_init": normal}
    options |= {"bidirectional": True, "proj_size": 2}
    one, same, other = (draw(shell, "LSTM", *SIZES, 2, seed=seed, **options) for seed in (0, 0, 1))
    assert_same(one, same, 0)
    flat, other_flat = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (one, other)
    )
    assert len(np.unique(flat)) > 0.99 * len(flat)
    assert not np.any(flat == other_flat)


@shells
def test_forget_bias(shell: str) -> None:
    for layer in draw(shell, "LSTM", *SIZES, 2, bias_init=forget_bias()).values():
        np.testing.assert_array_equal(
            layer["b_ih"] + layer["b_hh"], np.repeat([0, 1, 0, 0], 4).astype(np.float32)
        )


@shells
def test_forget_bias_of_what_has_no_forget_gate(shell: str) -> None:
    wrapped = WITH_PARTITIONING[shell](forget_bias(), ("model",))
    for init in (forget_bias(), wrapped):
        with pytest.raises(
            ValueError, match=r"bias_init, which draws b_ih, is for .* 4 gates, but it has 3"
        ):
            draw(shell, "GRU", *SIZES, bias_init=init)


@shells
def test_any_layer(shell: str) -> None:
    """Parameters of other names stay as their layer draws them."""
    stack = seqjax.Stack([LeakyCell(3, 5), seqjax.Bidirectional(*2 * [seqjax.GRUCell(5, 4)])])
    params = draw(shell, "Recurrent", stack, recurrent_kernel_init=ORTHOGONAL)
    assert (params["layers_0"]["decay"] == 0.5).all()
    for direction in params["layers_1"].values():
        for gate in np.split(direction["w_hh"], 3, axis=1):
            np.testing.assert_allclose(gate @ gate.T, np.eye(4), atol=1e-5)


@shells
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kernel_init": "zeros"}, TypeError, r"kernel_init should be an initializer .*got: str"),
        (
            {"recurrent_kernel_init": jax.nn.initializers.orthogonal},
            ValueError,
            r"recurrent_kernel_init, which draws w_hh, should give .*got: function.*made by a call",
        ),
        (
            {"kernel_init": lambda key, shape, dtype: jnp.ones((3, 16), dtype)},
            ValueError,
            r"kernel_init, .*w_ih, should give an array float32 \(3, 4\), got: float32 \(3, 16\)",
        ),
        (
            {"bias_init": lambda key, shape, dtype: jnp.ones(shape, "bfloat16")},
            ValueError,
            r"bias_init, .*b_ih, should give an array float32 \(16,\), got: bfloat16 \(16,\)",
        ),
        (
            {"bias": False, "bias_init": ZEROS},
            ValueError,
            "bias_init draws b_ih and b_hh, but the layer has no such parameters, only: w_hh, w_ih",
        ),
    ],
    ids=["no function", "not called", "all gates", "dtype", "no bias"],
)
@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_what_is_no_initializer_of_it(
    kind: str, options: Any, error: Any, message: str, shell: str
) -> None:
    with pytest.raises(error, match=message):
        draw(shell, kind, *SIZES, **options)


@shells
def test_a_box_of_the_other_library_is_refused(shell: str) -> None:
    other = WITH_PARTITIONING["nnx" if shell == "linen" else "linen"]
    with pytest.raises(ValueError, match=r"should give an array float32 \(12,\), got: [PV]"):
        draw(shell, "GRU", *SIZES, bias_init=other(ZEROS, ("model",)))


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell", "Recurrent"])
def test_what_cannot_draw_is_said_where_a_linen_module_is_made(kind: str) -> None:
    sizes = (LeakyCell(3, 5),) if kind == "Recurrent" else SIZES
    options = {} if kind == "Recurrent" else {"bias": False}
    with pytest.raises(ValueError, match="bias_init draws b_ih and b_hh, but the layer has no"):
        getattr(seqjax.linen, kind)(*sizes, bias_init=ZEROS, **options)


def test_nnx_keeps_no_initializer() -> None:
    """Which would make a program for each module, and modules that cannot be saved."""
    one, other = (
        seqjax.nnx.LSTM(*SIZES, kernel_init=jax.nn.initializers.normal(), rngs=nnx.Rngs(0))
        for _ in range(2)
    )
    graph = nnx.split(one)[0]
    assert graph == nnx.split(other)[0]
    assert graph == nnx.split(seqjax.nnx.LSTM(*SIZES, rngs=nnx.Rngs(0)))[0]
    for same in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert_same(same(X), one(X), 0)


def test_an_initializer_that_comes_too_late() -> None:
    made = seqjax.nnx.GRUCell(*SIZES, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="weights are made for bias_init=None: make another"):
        made.bias_init = ZEROS
    made.bias_init = None


def test_linen_draws_each_layer_once() -> None:
    drawn = []

    class Counted(LeakyCell):
        def init(self, key: jax.Array, dtype: Any = jnp.float32) -> Any:
            if not isinstance(jax.random.key_data(key), jax.core.Tracer):
                drawn.append(self.input_size)
            return super().init(key, dtype)

    made = seqjax.linen.Recurrent(seqjax.Stack([Counted(3, 5), Counted(5, 4)]))
    variables = made.init(jax.random.key(0), X)
    assert drawn == [3, 5]
    made.apply(variables, X)
    assert drawn == [3, 5]


BOXES: dict[str, Any] = {
    "kernel_init": (jax.nn.initializers.lecun_normal(), (None, "model")),
    "recurrent_kernel_init": (ORTHOGONAL, (None, "model")),
    "bias_init": (forget_bias(), ("model",)),
}
SPECS = {
    "w_ih": P(None, "model"),
    "w_hh": P(None, "model"),
    "w_hr": P(None, "model"),
    "b_ih": P("model"),
    "b_hh": P("model"),
}


class TestBoxes:
    def make(self, shell: str, box: Any = None) -> Any:
        box = box or WITH_PARTITIONING[shell]
        initializers = {name: box(*arguments) for name, arguments in BOXES.items()}
        kind = getattr(seqjax, shell).LSTM
        rngs = {"rngs": nnx.Rngs(0)} if shell == "nnx" else {}
        return kind(*SIZES, 2, proj_size=2, bidirectional=True, **initializers, **rngs)

    def check_specs(self, specs: Any) -> None:
        leaves = jax.tree.leaves_with_path(specs, is_leaf=lambda leaf: isinstance(leaf, P))
        assert len(leaves) == 4 * 5
        for path, spec in leaves:
            assert spec == SPECS[path[-1].key], path

    def test_nnx(self) -> None:
        """Flax shards what is annotated as it is made, so there must be a mesh."""
        mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
        plain = {name: init for name, (init, _) in BOXES.items()}
        sizes = {"proj_size": 2, "bidirectional": True}
        expected = seqjax.nnx.LSTM(*SIZES, 2, **sizes, **plain, rngs=nnx.Rngs(0))
        with jax.set_mesh(mesh):
            made = self.make("nnx")
            self.check_specs(nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(made))))
            assert_same(nnx.to_pure_dict(nnx.state(made)), nnx.to_pure_dict(nnx.state(expected)), 0)
            before = nnx.to_pure_dict(nnx.state(made))
            shardings = jax.tree.map(lambda leaf: leaf.sharding, before)
            made.load_torch_state_dict(
                {name: array + 1 for name, array in made.torch_state_dict().items()}
            )
            after = nnx.to_pure_dict(nnx.state(made))
            assert_same(after, jax.tree.map(lambda leaf: leaf + 1, before), 0)
            assert jax.tree.map(lambda leaf: leaf.sharding, after) == shardings
            self.check_specs(nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(made))))

    @pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning])
    def test_linen(self, box: Any) -> None:
        made = self.make("linen", box)
        variables = made.init(jax.random.key(0), X)
        self.check_specs(nn.get_partition_spec(variables))
        plain = nn.meta.unbox(variables)
        assert_same(made.apply(variables, X), made.apply(plain, X), 0)
        arrays = seqjax.linen.torch_state_dict(made, variables)
        assert all(type(array) is np.ndarray for array in arrays.values())
        np.testing.assert_array_equal(
            arrays["weight_hh_l1_reverse"].T, plain["params"]["layers_1"]["backward"]["w_hh"]
        )
        arrays = {name: array + 1 for name, array in arrays.items()}
        loaded = seqjax.linen.load_torch_state_dict(made, variables, arrays)
        self.check_specs(nn.get_partition_spec(loaded))
        assert_same(loaded, jax.tree.map(lambda leaf: leaf + 1, variables), 0)

    def test_linen_in_vmap_adds_an_axis(self) -> None:
        """As Flax's own layers in an ensemble: the boxes get one name more."""
        members = nn.vmap(
            seqjax.linen.GRUCell,
            in_axes=None,
            axis_size=2,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            metadata_params={nn.PARTITION_NAME: "member"},
        )(*SIZES, kernel_init=nn.with_partitioning(ORTHOGONAL, (None, "model")))
        variables = members.init(jax.random.key(0), X[0])
        box = variables["params"]["w_ih"]
        assert (box.names, box.value.shape) == (("member", None, "model"), (2, 3, 12))
        assert differ(*box.value)
        assert members.apply(variables, X[0]).shape == (2, BATCH, 4)
