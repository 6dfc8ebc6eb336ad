"""Everything that PyTorch refuses is refused here, in both Flax shells, with PyTorch's words.

The conditions follow a run of some 200 probes against PyTorch 2.13: constructor, call, cells,
packing. PyTorch's RuntimeError, IndexError and AttributeError become ValueError or TypeError.
What PyTorch warns about warns, and what it accepts is accepted with the same shapes. Where we are
stricter or go further, the test says so.
"""

import functools
import math
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_inputs
from shells import CELLS, LAYERS, SHELLS, Model, build, lstm_like

import seqjax

BAD = (TypeError, ValueError)

DROPOUT = r"dropout should be a number in range \[0, 1\] representing the probability"
DROPOUT_WARNING = (
    r"dropout option adds dropout after all but last recurrent layer, so non-zero dropout expects "
    r"num_layers greater than 1, but got dropout={} and num_layers=1"
)

# Keyword arguments on top of (3, 5), the error and its message.
CONSTRUCTOR = [
    ({"hidden_size": 0}, ValueError, "hidden_size must be greater than zero, got: 0"),
    ({"hidden_size": -1}, ValueError, "hidden_size must be greater than zero, got: -1"),
    ({"input_size": 0}, ValueError, "input_size must be greater than zero, got: 0"),
    ({"input_size": -1}, ValueError, "input_size must be greater than zero, got: -1"),
    ({"num_layers": 0}, ValueError, "num_layers must be greater than zero, got: 0"),
    ({"num_layers": -1}, ValueError, "num_layers must be greater than zero, got: -1"),
    ({"hidden_size": 5.0}, TypeError, "hidden_size should be of type int, got: float"),
    ({"input_size": 3.0}, TypeError, "input_size should be of type int, got: float"),
    ({"input_size": "10"}, TypeError, "input_size should be of type int, got: str"),
    ({"bias": 0}, TypeError, "bias should be of type bool, got: int"),
    ({"bias": 1}, TypeError, "bias should be of type bool, got: int"),
    ({"bias": "True"}, TypeError, "bias should be of type bool, got: str"),
    ({"batch_first": 0}, TypeError, "batch_first should be of type bool, got: int"),
    ({"batch_first": "False"}, TypeError, "batch_first should be of type bool, got: str"),
    ({"dropout": -0.1}, ValueError, rf"{DROPOUT}.*got: -0\.1"),
    ({"dropout": 1.1}, ValueError, rf"{DROPOUT}.*got: 1\.1"),
    ({"dropout": True}, ValueError, f"{DROPOUT}.*got: True"),
    ({"dropout": "0.5"}, ValueError, rf"{DROPOUT}.*got: '0\.5'"),
    ({"dropout": math.nan}, ValueError, f"{DROPOUT}.*got: nan"),
    ({"dropout": None}, ValueError, f"{DROPOUT}.*got: None"),
    # PyTorch says "'float' object cannot be interpreted as an integer".
    ({"num_layers": 2.0}, TypeError, "num_layers should be of type int, got: float"),
    # PyTorch leaves these unchecked.
    ({"bidirectional": 1}, TypeError, "bidirectional should be of type bool, got: int"),
    ({"bidirectional": "x"}, TypeError, "bidirectional should be of type bool, got: str"),
    ({"hidden_size": True}, TypeError, "hidden_size should be of type int, got: bool"),
    ({"input_size": True}, TypeError, "input_size should be of type int, got: bool"),
    ({"num_layers": True}, TypeError, "num_layers should be of type int, got: bool"),
]

LSTM_CONSTRUCTOR = [
    ({"proj_size": -1}, ValueError, "proj_size should be a positive integer or zero.*got: -1"),
    ({"proj_size": 5}, ValueError, "proj_size has to be smaller than hidden_size.*=5.*=5"),
    ({"proj_size": 6}, ValueError, "proj_size has to be smaller than hidden_size.*=6.*=5"),
    ({"proj_size": 2.0}, TypeError, "proj_size should be of type int, got: float"),
    ({"proj_size": True}, TypeError, "proj_size should be of type int, got: bool"),
    ({"nonlinearity": "relu"}, TypeError, "unexpected keyword argument 'nonlinearity'"),
]

CELL_CONSTRUCTOR = [
    # PyTorch leaves all of these unchecked, and LSTMCell(3, 0) builds.
    ({"hidden_size": 0}, ValueError, "hidden_size must be greater than zero, got: 0"),
    ({"input_size": -3}, ValueError, "input_size must be greater than zero, got: -3"),
    ({"hidden_size": 5.0}, TypeError, "hidden_size should be of type int, got: float"),
    ({"input_size": True}, TypeError, "input_size should be of type int, got: bool"),
    ({"bias": 1}, TypeError, "bias should be of type bool, got: int"),
    ({"num_layers": 1}, TypeError, "unexpected keyword argument 'num_layers'"),
]


def ids(case: Any) -> str | None:
    """Keyword arguments as a test's name."""
    return ",".join(f"{k}={v}" for k, v in case.items()) if isinstance(case, dict) else None


shells = pytest.mark.parametrize("shell", SHELLS)
layers = pytest.mark.parametrize("kind", LAYERS)
cells = pytest.mark.parametrize("kind", CELLS)


def arguments(**changes: Any) -> dict[str, Any]:
    """The arguments of a small valid module, some of them changed."""
    return {"input_size": 3, "hidden_size": 5} | changes


@functools.cache
def model(shell: str, kind: str, **options: Any) -> Model:
    """Sizes 3 and 5; the layers have two layers, as in the probes."""
    if kind in LAYERS:
        options.setdefault("num_layers", 2)
    return build(shell, kind, 3, 5, **options)


def inputs(*shape: int) -> jax.Array:
    return random_inputs(shape)


def state(kind: str, *shape: int) -> Any:
    """Random `h`, or `(h, c)`, in one shape."""
    h = random_inputs(shape, seed=3)
    return (h, random_inputs(shape, seed=4)) if lstm_like(kind) else h


def hidden(kind: str) -> str:
    """How messages call the first state."""
    return r"hidden\[0\]" if lstm_like(kind) else "hidden"


class TestConstructor:
    @shells
    @layers
    @pytest.mark.parametrize(("changes", "error", "message"), CONSTRUCTOR, ids=ids)
    def test_refused(self, shell, kind, changes, error, message):
        with pytest.raises(error, match=message):
            build(shell, kind, **arguments(**changes))

    @shells
    @pytest.mark.parametrize(("changes", "error", "message"), LSTM_CONSTRUCTOR, ids=ids)
    def test_refused_by_lstm(self, shell, changes, error, message):
        with pytest.raises(error, match=message):
            build(shell, "LSTM", **arguments(**changes))

    @shells
    @cells
    @pytest.mark.parametrize(("changes", "error", "message"), CELL_CONSTRUCTOR, ids=ids)
    def test_refused_by_cells(self, shell, kind, changes, error, message):
        with pytest.raises(error, match=message):
            build(shell, kind, **arguments(**changes))

    @shells
    @pytest.mark.parametrize("kind", ["RNN", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
    @pytest.mark.parametrize("proj_size", [0, 2])
    def test_proj_size_is_for_lstm_only_even_when_0(self, shell, kind, proj_size):
        with pytest.raises(TypeError, match="unexpected keyword argument 'proj_size'"):
            build(shell, kind, 3, 5, proj_size=proj_size)

    @shells
    @pytest.mark.parametrize("kind", ["RNN", "RNNCell"])  # PyTorch's cell notices at the call.
    @pytest.mark.parametrize("nonlinearity", ["sigmoid", "Tanh", None, 0])
    def test_unknown_nonlinearity(self, shell, kind, nonlinearity):
        message = f"Unknown nonlinearity {nonlinearity!r}. Select from 'tanh' or 'relu'."
        with pytest.raises(ValueError, match=re.escape(message)):
            build(shell, kind, 3, 5, nonlinearity=nonlinearity)

    @shells
    def test_fourth_argument_is_nonlinearity_of_rnn_and_bias_of_the_others(self, shell):
        assert build(shell, "RNN", 3, 5, 1, "relu").module.nonlinearity == "relu"
        for kind in ("LSTM", "GRU"):
            with pytest.raises(TypeError, match="bias should be of type bool, got: str"):
                build(shell, kind, 3, 5, 1, "relu")
        with pytest.raises(ValueError, match="Unknown nonlinearity True"):
            build(shell, "RNN", 3, 5, 1, True)

    @shells
    @layers
    @pytest.mark.parametrize("dropout", [0.5, 1])
    def test_dropout_with_one_layer_warns(self, shell, kind, dropout):
        with pytest.warns(UserWarning, match=DROPOUT_WARNING.format(dropout)) as caught:
            made = build(shell, kind, 3, 5, dropout=dropout)
        assert len(caught) == 1
        assert made.module.dropout == dropout

    @shells
    @layers
    def test_dropout_with_one_layer_warns_in_the_constructor_only(self, shell, kind):
        with pytest.warns(UserWarning, match="dropout option"):
            made = build(shell, kind, 3, 5, dropout=0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made(inputs(6, 4, 3))

    @shells
    @layers
    @pytest.mark.parametrize("dropout", [0.5, 1, 0, np.float32(0.5)])
    def test_dropout_with_two_layers_does_not_warn(self, shell, kind, dropout):
        assert build(shell, kind, 3, 5, 2, dropout=dropout).module.dropout == dropout

    @shells
    def test_layer_of_recurrent(self, shell):
        # Linen may notice at the first call only.
        with pytest.raises(TypeError, match=r"should be a seqjax layer.*got: str"):
            build(shell, "Recurrent", "LSTM")(inputs(6, 4, 3))

    @shells
    def test_batch_first_of_recurrent(self, shell):
        with pytest.raises(TypeError, match="batch_first should be of type bool, got: int"):
            build(shell, "Recurrent", seqjax.GRUCell(3, 5), batch_first=1)(inputs(6, 4, 3))

    @shells
    @pytest.mark.parametrize("kind", LAYERS + CELLS)
    def test_weights_have_a_floating_dtype(self, shell, kind):
        with pytest.raises(BAD, match="float"):
            build(shell, kind, 3, 5, param_dtype=jnp.int32)(inputs(2, 3))


class TestCall:
    @shells
    @layers
    @pytest.mark.parametrize("shape", [(), (3,), (6, 4, 2, 3)])
    def test_rank_of_input(self, shell, kind, shape):
        message = f"{kind}: Expected input to be 2D or 3D, got {len(shape)}D"
        with pytest.raises(ValueError, match=message):
            model(shell, kind)(inputs(*shape))

    @shells
    @layers
    @pytest.mark.parametrize("shape", [(6, 4, 7), (6, 7), (6, 4, 1), (3, 6, 4)])
    def test_features_of_input(self, shell, kind, shape):
        message = rf"input.size\(-1\) must be equal to input_size. Expected 3, got {shape[-1]}"
        with pytest.raises(ValueError, match=message):
            model(shell, kind)(inputs(*shape))

    @shells
    @layers
    @pytest.mark.parametrize(
        ("batch", "shape", "got"),
        [
            (7, (2, 4, 5), (2, 7, 5)),  # batch of the input
            (4, (2, 7, 5), (2, 4, 5)),  # batch of the state
            (4, (2, 4, 7), (2, 4, 5)),  # features
            (4, (7, 4, 5), (2, 4, 5)),  # layers
            (4, (2, 1, 5), (2, 4, 5)),  # no broadcasting
            (4, (1, 4, 5), (2, 4, 5)),
            (4, (2, 4, 1), (2, 4, 5)),
            (4, (4, 2, 5), (2, 4, 5)),  # batch first
        ],
    )
    def test_shape_of_state(self, shell, kind, batch, shape, got):
        message = rf"Expected {hidden(kind)} size {re.escape(str(got))}, got \[{shape[0]}, "
        with pytest.raises(ValueError, match=message + rf"{shape[1]}, {shape[2]}\]"):
            model(shell, kind)(inputs(6, batch, 3), state(kind, *shape))

    @shells
    @layers
    def test_shape_of_state_with_batch_first(self, shell, kind):
        """States are never batch-first, so the size is the same whatever `batch_first` says."""
        message = rf"Expected {hidden(kind)} size \(2, 4, 5\), got \[4, 2, 5\]"
        with pytest.raises(ValueError, match=message):
            model(shell, kind, batch_first=True)(inputs(4, 6, 3), state(kind, 4, 2, 5))

    @shells
    @layers
    def test_shape_of_state_counts_directions(self, shell, kind):
        message = rf"Expected {hidden(kind)} size \(4, 4, 5\), got \[2, 4, 5\]"
        with pytest.raises(ValueError, match=message):
            model(shell, kind, bidirectional=True)(inputs(6, 4, 3), state(kind, 2, 4, 5))

    @shells
    @layers
    def test_shape_of_state_for_one_sequence(self, shell, kind):
        """PyTorch prints a batch of 1 that the user never gave; ours has no batch."""
        message = rf"Expected {hidden(kind)} size \(2, 5\), got \[2, 7\]"
        with pytest.raises(ValueError, match=message):
            model(shell, kind)(inputs(6, 3), state(kind, 2, 7))

    @shells
    @layers
    @pytest.mark.parametrize(
        ("input_shape", "state_shape", "what"),
        [
            ((6, 4, 3), (4, 5), "For batched 3-D input, hx{} should also be 3-D but got {}"),
            ((6, 4, 3), (5,), "For batched 3-D input, hx{} should also be 3-D but got {}"),
            ((6, 3), (2, 4, 5), "For unbatched 2-D input, hx{} should also be 2-D but got {}"),
            ((6, 3), (5,), "For unbatched 2-D input, hx{} should also be 2-D but got {}"),
        ],
    )
    def test_rank_of_state(self, shell, kind, input_shape, state_shape, what):
        rank = len(state_shape)
        if lstm_like(kind):
            message = what.format(" and cx", rf"\({rank}-D, {rank}-D\) tensors")
        else:
            message = what.format("", f"{rank}-D tensor")
        with pytest.raises(ValueError, match=message):
            model(shell, kind)(inputs(*input_shape), state(kind, *state_shape))

    @shells
    def test_rank_of_lstm_cell_state_alone(self, shell):
        message = r"hx and cx should also be 3-D but got \(3-D, 2-D\) tensors"
        with pytest.raises(ValueError, match=message):
            model(shell, "LSTM")(inputs(6, 4, 3), (inputs(2, 4, 5), inputs(4, 5)))

    @shells
    @layers
    @pytest.mark.parametrize("dtype", ["float64", "int64", "float16", "bfloat16", "bool", "uint8"])
    def test_dtype_of_input(self, x64, shell, kind, dtype):
        message = rf"input dtype \({dtype}\) does not match weight dtype \(float32\). Convert input"
        with pytest.raises(ValueError, match=message):
            model(shell, kind)(inputs(6, 4, 3).astype(dtype))

    @shells
    @pytest.mark.parametrize("kind", LAYERS + CELLS)
    @pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
    def test_input_without_floating_dtype_is_not_cast_to_the_compute_dtype(
        self, shell, kind, dtype
    ):
        with pytest.raises(TypeError, match=f"input should have a floating dtype, got: {dtype}"):
            model(shell, kind, dtype=jnp.bfloat16)(inputs(6, 3).astype(dtype))

    @shells
    @pytest.mark.parametrize("kind", ["GRU", *CELLS])
    @pytest.mark.parametrize("dtype", ["int32", "complex64"])
    def test_compute_dtype_is_floating(self, shell, kind, dtype):
        # Cast to integers, an input and its weights would be zeros: numbers, and all wrong.
        with pytest.raises(TypeError, match=f"dtype should be a floating dtype, got: {dtype}"):
            build(shell, kind, 3, 5, dtype=jnp.dtype(dtype))(inputs(6, 3))

    @shells
    @layers
    @pytest.mark.parametrize("dtype", ["float64", "float16", "int32"])
    def test_dtype_of_state(self, x64, shell, kind, dtype):
        wrong = jax.tree.map(lambda s: s.astype(dtype), state(kind, 2, 4, 5))
        message = rf"{kind}: state dtype \({dtype}\) does not match input dtype \(float32\)"
        with pytest.raises(BAD, match=message):
            model(shell, kind)(inputs(6, 4, 3), wrong)

    @shells
    @layers
    @pytest.mark.parametrize("shape", [(0, 4, 3), (0, 3), (0, 0, 3)])
    def test_no_steps(self, shell, kind, shape):
        with pytest.raises(ValueError, match="Expected sequence length to be larger than 0 in RNN"):
            model(shell, kind)(inputs(*shape))

    @shells
    @layers
    def test_no_steps_with_batch_first(self, shell, kind):
        with pytest.raises(ValueError, match="Expected sequence length to be larger than 0 in RNN"):
            model(shell, kind, batch_first=True)(inputs(4, 0, 3))

    @shells
    @pytest.mark.parametrize(
        ("make", "got"),
        [
            (lambda s: s, "Array"),  # a lone array
            (lambda s: (s,), "tuple of 1"),
            (lambda s: (s, s, s), "tuple of 3"),
            (lambda s: [s, s, s], "list of 3"),
            (lambda s: (s, None), "None"),
            (lambda s: (None, s), "None"),
            (lambda s: {"h": s, "c": s}, "dict"),
            (lambda s: "hc", "str"),
        ],
    )
    def test_structure_of_lstm_state(self, shell, make, got):
        message = rf"LSTM: hx should be a tuple of two arrays \(h_0, c_0\), got: .*{got}"
        with pytest.raises(TypeError, match=message):
            model(shell, "LSTM")(inputs(6, 4, 3), make(inputs(2, 4, 5)))

    @shells
    @pytest.mark.parametrize("kind", ["RNN", "GRU", "RNNCell", "GRUCell"])
    @pytest.mark.parametrize("container", [tuple, list])
    def test_structure_of_the_others_state(self, shell, kind, container):
        h = inputs(2, 4, 5) if kind in LAYERS else inputs(4, 5)
        x = inputs(6, 4, 3) if kind in LAYERS else inputs(4, 3)
        message = f"{kind}: hx should be an array h_0, got: {container.__name__}"
        with pytest.raises(TypeError, match=message):
            model(shell, kind)(x, container((h, h)))

    @shells
    @pytest.mark.parametrize(
        ("h_size", "c_size", "proj_size", "message"),
        [
            (5, 7, 0, r"Expected hidden\[1\] size \(2, 4, 5\), got \[2, 4, 7\]"),
            (5, 5, 2, r"Expected hidden\[0\] size \(2, 4, 2\), got \[2, 4, 5\]"),
            (2, 2, 2, r"Expected hidden\[1\] size \(2, 4, 5\), got \[2, 4, 2\]"),
        ],
    )
    def test_sizes_of_lstm_state(self, shell, h_size, c_size, proj_size, message):
        with pytest.raises(ValueError, match=message):
            model(shell, "LSTM", proj_size=proj_size)(
                inputs(6, 4, 3), (inputs(2, 4, h_size), inputs(2, 4, c_size))
            )

    @shells
    @layers
    @pytest.mark.parametrize("implementation", ["cuda", "", 5, True])
    def test_unknown_implementation(self, shell, kind, implementation):
        with pytest.raises(ValueError, match=f"unknown implementation {implementation!r}.*'scan'"):
            model(shell, kind, implementation=implementation)(inputs(6, 4, 3))

    @shells
    @layers
    @pytest.mark.parametrize("junk", [None, "abc"])
    def test_input_that_is_no_array(self, shell, kind, junk):
        with pytest.raises(BAD):
            model(shell, kind)(junk)


class TestAccepted:
    @shells
    @layers
    @pytest.mark.parametrize("batch_first", [False, True])
    def test_batch_0(self, shell, kind, batch_first):
        shape = (0, 6, 3) if batch_first else (6, 0, 3)
        output, final = model(shell, kind, batch_first=batch_first)(inputs(*shape))
        assert output.shape == (*shape[:2], 5)
        assert [leaf.shape for leaf in jax.tree.leaves(final)] == [(2, 0, 5)] * (
            2 if lstm_like(kind) else 1
        )

    @shells
    @layers
    def test_batch_0_with_lengths(self, shell, kind):
        lengths = jnp.zeros((0,), jnp.int32)
        output, _ = model(shell, kind)(inputs(6, 0, 3), lengths=lengths)
        assert output.shape == (6, 0, 5)

    @shells
    @layers
    def test_gradient_with_batch_0(self, shell, kind):
        made, x = model(shell, kind), inputs(6, 0, 3)
        gradient = jax.grad(lambda x: made(x)[0].sum())(x)
        assert gradient.shape == (6, 0, 3)

    @shells
    def test_lstm_state_as_a_list(self, shell):
        x, (h, c) = inputs(6, 4, 3), state("LSTM", 2, 4, 5)
        output, final = model(shell, "LSTM")(x, [h, c])
        expected, _ = model(shell, "LSTM")(x, (h, c))
        np.testing.assert_array_equal(output, expected)
        assert type(final) is tuple

    @shells
    def test_state_with_projection(self, shell):
        h, c = inputs(2, 4, 2), inputs(2, 4, 5)
        output, (h_n, c_n) = model(shell, "LSTM", proj_size=2)(inputs(6, 4, 3), (h, c))
        assert (output.shape, h_n.shape, c_n.shape) == ((6, 4, 2), (2, 4, 2), (2, 4, 5))

    @shells
    @layers
    def test_numpy_input_and_state(self, shell, kind):
        """Of float64, too, which JAX turns into float32 as long as 64-bit types are off."""
        x, hx = inputs(6, 4, 3), state(kind, 2, 4, 5)
        expected, _ = model(shell, kind)(x, hx)
        got, _ = model(shell, kind)(np.asarray(x), jax.tree.map(np.asarray, hx))
        np.testing.assert_array_equal(got, expected)
        wide, _ = model(shell, kind)(np.asarray(x, np.float64), hx)
        np.testing.assert_array_equal(wide, expected)


class TestCells:
    @shells
    @cells
    @pytest.mark.parametrize("shape", [(), (2, 4, 3)])
    def test_rank_of_input(self, shell, kind, shape):
        message = f"{kind}: Expected input to be 1D or 2D, got {len(shape)}D"
        with pytest.raises(ValueError, match=message):
            model(shell, kind)(inputs(*shape))

    @shells
    @cells
    @pytest.mark.parametrize("shape", [(4, 11), (11,)])
    def test_features_of_input(self, shell, kind, shape):
        message = "input has inconsistent input_size: got 11 expected 3"
        with pytest.raises(ValueError, match=message):
            model(shell, kind)(inputs(*shape))

    @shells
    @cells
    @pytest.mark.parametrize(
        ("input_shape", "state_shape", "message"),
        [
            ((3, 3), (3, 21), "hidden0 has inconsistent hidden_size: got 21, expected 5"),
            ((3,), (21,), "hidden0 has inconsistent hidden_size: got 21, expected 5"),
            ((3, 3), (5, 5), "Input batch size 3 doesn't match hidden0 batch size 5"),
            ((3, 3), (1, 5), "Input batch size 3 doesn't match hidden0 batch size 1"),
            # PyTorch's messages for these two speak of batch and hidden size.
            ((3, 3), (5,), "For 2-D input, hidden0 should also be 2-D but got 1-D"),
            ((3,), (1, 5), "For 1-D input, hidden0 should also be 1-D but got 2-D"),
        ],
    )
    def test_shape_of_state(self, shell, kind, input_shape, state_shape, message):
        with pytest.raises(ValueError, match=message):
            model(shell, kind)(inputs(*input_shape), state(kind, *state_shape))

    @shells
    @cells
    @pytest.mark.parametrize("shape", [(2, 1, 3, 5), ()])
    def test_rank_of_state(self, shell, kind, shape):
        which = r"hx\[0\]" if lstm_like(kind) else "hidden"
        message = f"{kind}: Expected {which} to be 1D or 2D, got {len(shape)}D"
        with pytest.raises(ValueError, match=message):
            model(shell, kind)(inputs(3, 3), state(kind, *shape))

    @shells
    @pytest.mark.parametrize(
        ("c_shape", "message"),
        [
            ((3, 7), "hidden1 has inconsistent hidden_size: got 7, expected 5"),
            ((1, 5), "Input batch size 3 doesn't match hidden1 batch size 1"),
            ((5,), "For 2-D input, hidden1 should also be 2-D but got 1-D"),
            ((1, 2, 3, 5), r"Expected hx\[1\] to be 1D or 2D, got 4D"),
        ],
    )
    def test_shape_of_lstm_cell_state_alone(self, shell, c_shape, message):
        with pytest.raises(ValueError, match=message):
            model(shell, "LSTMCell")(inputs(3, 3), (inputs(3, 5), inputs(*c_shape)))

    @shells
    @pytest.mark.parametrize(
        "make", [lambda s: s, lambda s: (s,), lambda s: (s, s, s), lambda s: (s, None)]
    )
    def test_structure_of_lstm_state(self, shell, make):
        with pytest.raises(TypeError, match="LSTMCell: hx should be a tuple of two arrays"):
            model(shell, "LSTMCell")(inputs(3, 3), make(inputs(3, 5)))

    @shells
    @cells
    @pytest.mark.parametrize("dtype", ["float64", "float16", "int32"])
    def test_dtype_of_input(self, x64, shell, kind, dtype):
        message = rf"{kind}: input dtype \({dtype}\) does not match weight dtype \(float32\)"
        with pytest.raises(ValueError, match=message):
            model(shell, kind)(inputs(3, 3).astype(dtype))

    @shells
    @cells
    @pytest.mark.parametrize("dtype", ["float64", "float16", "int32"])
    def test_dtype_of_state(self, x64, shell, kind, dtype):
        wrong = jax.tree.map(lambda s: s.astype(dtype), state(kind, 3, 5))
        message = rf"{kind}: state dtype \({dtype}\) does not match input dtype \(float32\)"
        with pytest.raises(BAD, match=message):
            model(shell, kind)(inputs(3, 3), wrong)

    @shells
    @cells
    @pytest.mark.parametrize("batch_shape", [(3,), (), (0,)])
    def test_accepted_without_state(self, shell, kind, batch_shape):
        got = model(shell, kind)(inputs(*batch_shape, 3))
        expected = [(*batch_shape, 5)] * (2 if lstm_like(kind) else 1)
        assert [leaf.shape for leaf in jax.tree.leaves(got)] == expected
        assert type(got) is tuple if lstm_like(kind) else isinstance(got, jax.Array)


class TestLengths:
    """What `pack_padded_sequence` refuses, and what it should."""

    @shells
    @layers
    @pytest.mark.parametrize("unbatched", [False, True])
    @pytest.mark.parametrize("bad", [-1, 7, 100])
    def test_out_of_range(self, shell, kind, bad, unbatched):
        """PyTorch accepts what is above T, and fails later."""
        x = inputs(6, 3) if unbatched else inputs(6, 3, 3)
        lengths = np.array(bad) if unbatched else np.array([6, bad, 2])
        low, high = min(lengths.min(), bad), max(lengths.max(), bad)
        message = (
            f"lengths should be between 0 and the number of steps 6, got: min {low} and max {high}"
        )
        with pytest.raises(ValueError, match=message):
            model(shell, kind)(x, lengths=lengths)
        with pytest.raises(ValueError, match=message):
            model(shell, kind)(x, lengths=jnp.asarray(lengths))

    @shells
    @layers
    def test_out_of_range_counts_steps_not_rows_with_batch_first(self, shell, kind):
        made = model(shell, kind, batch_first=True)
        made(inputs(3, 6, 3), lengths=jnp.array([6, 4, 0]))
        with pytest.raises(ValueError, match="the number of steps 6, got: min 1 and max 7"):
            made(inputs(3, 6, 3), lengths=jnp.array([1, 4, 7]))

    @shells
    @layers
    @pytest.mark.parametrize("shape", [(2,), (4,), (), (3, 1), (1, 3)])
    @pytest.mark.parametrize("batch_first", [False, True])
    def test_not_one_a_row(self, shell, kind, shape, batch_first):
        x = inputs(3, 6, 3) if batch_first else inputs(6, 3, 3)
        message = rf"one entry a row: expected shape \(3,\), got {re.escape(str(shape))}"
        with pytest.raises(ValueError, match=message):
            model(shell, kind, batch_first=batch_first)(x, lengths=np.ones(shape, np.int32))

    @shells
    @layers
    def test_not_a_scalar_for_one_sequence(self, shell, kind):
        message = r"lengths should have one entry a row: expected shape \(\), got \(1,\)"
        with pytest.raises(ValueError, match=message):
            model(shell, kind)(inputs(6, 3), lengths=jnp.array([4]))

    @shells
    @layers
    @pytest.mark.parametrize(
        "lengths",
        [
            jnp.array([4.0, 2.0, 1.0]),  # PyTorch cuts them to integers.
            jnp.array([True, False, True]),  # A mask by mistake; PyTorch reads 1, 0, 1.
            np.array([4.5, 2.5, 1.0]),
            [4.0, 2, 1],
            [True, False, True],
        ],
        ids=["float", "bool", "numpy float", "list of float", "list of bool"],
    )
    def test_not_integers(self, shell, kind, lengths):
        with pytest.raises(
            TypeError, match=r"lengths should be of an integer dtype, got: (float|bool)"
        ):
            model(shell, kind)(inputs(6, 3, 3), lengths=lengths)

    @shells
    @layers
    @pytest.mark.parametrize(
        "lengths",
        [
            [4, 6, 1],
            (4, 6, 1),
            np.array([4, 6, 1], np.int8),
            np.array([4, 6, 1], np.uint8),
            jnp.array([4, 6, 1], jnp.int32),
        ],
        ids=["list", "tuple", "int8", "uint8", "int32"],
    )
    def test_any_integers_in_any_order(self, shell, kind, lengths):
        output, _ = model(shell, kind)(inputs(6, 3, 3), lengths=lengths)
        valid = np.arange(6)[:, None] < np.array([4, 6, 1])
        np.testing.assert_array_equal((output != 0).any(-1), valid)

    @shells
    @layers
    def test_length_0(self, shell, kind):
        """Where PyTorch refuses: output 0, and the state stays what it was."""
        hx = state(kind, 2, 3, 5)
        output, final = model(shell, kind)(inputs(6, 3, 3), hx, lengths=jnp.array([6, 0, 2]))
        np.testing.assert_array_equal(output[:, 1], 0)
        for before, after in zip(jax.tree.leaves(hx), jax.tree.leaves(final), strict=True):
            np.testing.assert_array_equal(after[:, 1], before[:, 1])
            assert (after[:, 0] != before[:, 0]).all()

    @shells
    @layers
    def test_lengths_and_mask(self, shell, kind):
        with pytest.raises(ValueError, match="got both lengths and mask"):
            model(shell, kind)(
                inputs(6, 3, 3), lengths=jnp.array([6, 2, 1]), mask=jnp.ones((6, 3), bool)
            )

    @shells
    @layers
    @pytest.mark.parametrize("shape", [(1, 2, 5), (2, 7, 5)])
    def test_state_of_the_wrong_shape_with_lengths(self, shell, kind, shape):
        message = rf"Expected {hidden(kind)} size \(2, 3, 5\), got \[{shape[0]}, {shape[1]}, 5\]"
        with pytest.raises(ValueError, match=message):
            model(shell, kind)(inputs(6, 3, 3), state(kind, *shape), lengths=jnp.array([6, 2, 1]))

    @shells
    @layers
    def test_state_without_batch_with_lengths(self, shell, kind):
        with pytest.raises(ValueError, match="should also be 3-D but got"):
            model(shell, kind)(inputs(6, 3, 3), state(kind, 2, 5), lengths=jnp.array([6, 2, 1]))


class TestMask:
    @shells
    @layers
    @pytest.mark.parametrize("dtype", ["int32", "float32", "uint8"])
    def test_dtype(self, shell, kind, dtype):
        with pytest.raises(TypeError, match=f"mask should be of dtype bool, got: {dtype}"):
            model(shell, kind)(inputs(6, 4, 3), mask=jnp.ones((6, 4), dtype))

    @shells
    @layers
    @pytest.mark.parametrize(
        "shape", [(4, 6), (6,), (4,), (6, 4, 3), (6, 4, 1), (6, 1), (1, 4), ()]
    )
    def test_shape(self, shell, kind, shape):
        expected = rf"expected shape \(6, 4\), got {re.escape(str(shape))}"
        message = f"mask should have the input's layout without features: {expected}"
        with pytest.raises(ValueError, match=message):
            model(shell, kind)(inputs(6, 4, 3), mask=jnp.ones(shape, bool))

    @shells
    @layers
    @pytest.mark.parametrize("shape", [(6, 4), (6,), (4, 6, 3)])
    def test_shape_with_batch_first(self, shell, kind, shape):
        expected = rf"expected shape \(4, 6\), got {re.escape(str(shape))}"
        message = f"mask should have the input's layout without features: {expected}"
        with pytest.raises(ValueError, match=message):
            model(shell, kind, batch_first=True)(inputs(4, 6, 3), mask=jnp.ones(shape, bool))

    @shells
    @layers
    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize("shape", [(6, 1), (1, 6), (5,), ()])
    def test_shape_for_one_sequence(self, shell, kind, shape, batch_first):
        message = rf"expected shape \(6,\), got {re.escape(str(shape))}"
        with pytest.raises(ValueError, match=message):
            model(shell, kind, batch_first=batch_first)(inputs(6, 3), mask=jnp.ones(shape, bool))


class TestRecurrent:
    LAYER = seqjax.Stack([seqjax.LSTMCell(3, 5), seqjax.GRUCell(5, 4)])

    def carry(self) -> Any:
        return (seqjax.LSTMCarry(inputs(2, 5), inputs(2, 5)), inputs(2, 4))

    @shells
    @pytest.mark.parametrize(
        "change",
        [
            lambda carry: carry[0],
            lambda carry: carry[:1],
            lambda carry: list(carry),
            lambda carry: (tuple(carry[0]), carry[1]),
            lambda carry: (carry[0], None),
            lambda carry: (carry[0]._replace(c=None), carry[1]),
            lambda carry: carry[1],
        ],
    )
    def test_structure_of_carry(self, shell, change):
        with pytest.raises(TypeError, match=r"carry should have the structure.*LSTMCarry.*got: "):
            build(shell, "Recurrent", self.LAYER)(inputs(6, 2, 3), change(self.carry()))

    @shells
    @pytest.mark.parametrize("shape", [(3, 5), (5,), (2, 4), (1, 5), (1, 2, 5)])
    def test_shape_of_carry(self, shell, shape):
        lstm, gru = self.carry()
        message = rf"carry\[0\]\.c: expected shape \(2, 5\), got {re.escape(str(shape))}"
        with pytest.raises(ValueError, match=message):
            build(shell, "Recurrent", self.LAYER)(
                inputs(6, 2, 3), (lstm._replace(c=inputs(*shape)), gru)
            )

    @shells
    def test_dtype_of_carry(self, shell):
        lstm, gru = self.carry()
        with pytest.raises(BAD, match=r"state dtype \(float16\) does not match input.*float32"):
            build(shell, "Recurrent", self.LAYER)(inputs(6, 2, 3), (lstm, gru.astype(jnp.float16)))

    @shells
    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize("shape", [(), (3,)])
    def test_rank_of_input(self, shell, shape, batch_first):
        with pytest.raises(ValueError, match=r"at least 2 dimensions.*got shape"):
            build(shell, "Recurrent", self.LAYER, batch_first=batch_first)(inputs(*shape))

    @shells
    def test_features_of_input(self, shell):
        with pytest.raises(ValueError, match=r"input_size. Expected 3, got 7"):
            build(shell, "Recurrent", self.LAYER)(inputs(6, 2, 7))

    @shells
    def test_dtype_of_input(self, shell):
        message = r"input dtype \(float16\) does not match weight dtype \(float32\)"
        with pytest.raises(ValueError, match=message):
            build(shell, "Recurrent", self.LAYER)(inputs(6, 2, 3).astype(jnp.float16))

    @shells
    def test_lengths_with_several_batch_dimensions(self, shell):
        message = r"expected shape \(2, 4\), got \(4,\)"
        with pytest.raises(ValueError, match=message):
            build(shell, "Recurrent", self.LAYER)(
                inputs(6, 2, 4, 3), lengths=jnp.array([6, 2, 1, 0])
            )

    @shells
    def test_mask_with_several_batch_dimensions(self, shell):
        message = r"expected shape \(2, 4, 6\), got \(6, 2, 4\)"
        with pytest.raises(ValueError, match=message):
            build(shell, "Recurrent", self.LAYER, batch_first=True)(
                inputs(2, 4, 6, 3), mask=jnp.ones((6, 2, 4), bool)
            )

    @shells
    def test_unknown_implementation(self, shell):
        with pytest.raises(ValueError, match="unknown implementation 'cuda'"):
            build(shell, "Recurrent", self.LAYER, implementation="cuda")(inputs(6, 2, 3))


class TestUnderJit:
    """What can be known at trace time raises there; what cannot be known is not looked at."""

    @shells
    @pytest.mark.parametrize(
        ("shape", "state_shape", "options", "message"),
        [
            ((3,), None, {}, "Expected input to be 2D or 3D, got 1D"),
            ((6, 4, 7), None, {}, "Expected 3, got 7"),
            ((0, 4, 3), None, {}, "Expected sequence length to be larger than 0"),
            ((6, 4, 3), (2, 4, 7), {}, r"Expected hidden size \(2, 4, 5\), got \[2, 4, 7\]"),
            ((6, 4, 3), (4, 5), {}, "hx should also be 3-D but got 2-D"),
            ((6, 4, 3), None, {"lengths": jnp.array([1, 2])}, r"expected shape \(4,\), got \(2,\)"),
            ((6, 4, 3), None, {"lengths": jnp.ones(4)}, "integer dtype, got: float32"),
            ((6, 4, 3), None, {"mask": jnp.ones((4, 6), bool)}, r"expected shape \(6, 4\)"),
            ((6, 4, 3), None, {"mask": jnp.ones((6, 4))}, "dtype bool, got: float32"),
        ],
    )
    def test_static_conditions_raise(self, shell, shape, state_shape, options, message):
        made = model(shell, "GRU")
        hx = None if state_shape is None else inputs(*state_shape)
        call = jax.jit(lambda params, x, hx, options: made.apply(params, x, hx, **options))
        with pytest.raises(BAD, match=message):
            call(made.params, inputs(*shape), hx, options)

    @shells
    def test_dtype_raises(self, shell):
        made = model(shell, "GRU")
        with pytest.raises(ValueError, match=r"float16.*does not match.*float32"):
            jax.jit(made.apply)(made.params, inputs(6, 4, 3).astype(jnp.float16))

    @shells
    def test_lengths_known_at_trace_time_raise(self, shell):
        made = model(shell, "GRU")
        lengths = np.array([1, 2, 7])
        with pytest.raises(ValueError, match="got: min 1 and max 7"):
            jax.jit(lambda params, x: made.apply(params, x, lengths=lengths))(
                made.params, inputs(6, 3, 3)
            )

    @shells
    def test_traced_lengths_work(self, shell):
        made, x = model(shell, "GRU"), inputs(6, 3, 3)
        call = jax.jit(lambda params, x, lengths: made.apply(params, x, lengths=lengths))
        for lengths in ([6, 0, 2], [1, 5, 6]):
            got, _ = call(made.params, x, jnp.array(lengths))
            expected, _ = made(x, lengths=jnp.array(lengths))
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)

    @shells
    def test_traced_lengths_out_of_range_act_as_the_nearest_in_range(self, shell):
        made, x = model(shell, "GRU"), inputs(6, 3, 3)
        call = jax.jit(lambda params, x, lengths: made.apply(params, x, lengths=lengths))
        got, _ = call(made.params, x, jnp.array([9, -2, 3]))
        expected, _ = call(made.params, x, jnp.array([6, 0, 3]))
        np.testing.assert_array_equal(got, expected)


class TestWeights:
    """`load_state_dict` with what does not fit."""

    def load(self, made: Model, state_dict: dict[str, Any]) -> Any:
        if hasattr(made.module, "load_torch_state_dict"):
            return made.module.load_torch_state_dict(state_dict)
        return seqjax.linen.load_torch_state_dict(made.module, {"params": made.params}, state_dict)

    def state_dict(self, **changes: Any) -> dict[str, Any]:
        entries = {
            "weight_ih_l0": np.ones((20, 3), np.float32),
            "weight_hh_l0": np.ones((20, 5), np.float32),
            "bias_ih_l0": np.ones(20, np.float32),
            "bias_hh_l0": np.ones(20, np.float32),
        }
        return {k: v for k, v in (entries | changes).items() if v is not None}

    @shells
    @pytest.mark.parametrize(
        ("bias", "changes", "message"),
        [
            (True, {"bias_hh_l0": None}, r'Missing key\(s\) in state_dict: "bias_hh_l0"\.'),
            (
                False,
                {},
                r'Unexpected key\(s\) in state_dict: "bias_hh_l0", "bias_ih_l0"\.',
            ),
            (
                True,
                {"weight_ih_l0": np.ones((20, 4), np.float32)},
                r"size mismatch for weight_ih_l0: got shape \(20, 4\), expected \(20, 3\)",
            ),
        ],
    )
    def test_refused(self, shell, bias, changes, message):
        made = build(shell, "LSTM", 3, 5, bias=bias)
        with pytest.raises(ValueError, match=message):
            self.load(made, self.state_dict(**changes))


class TestHelpers:
    """The packing helpers' own errors, in the functions that stand for them."""

    def test_pad_sequence(self):
        with pytest.raises(TypeError, match=r"Expected iterable for input sequences.*int"):
            seqjax.pad_sequence(5)
        with pytest.raises(ValueError, match="received an empty list of sequences"):
            seqjax.pad_sequence([])

    def test_unpad_sequence(self):
        padded = jnp.ones((4, 3, 2))
        with pytest.raises(ValueError, match=r"batch_size, but got shape \(2,\) \(batch_size=3\)"):
            seqjax.unpad_sequence(padded, [4, 2])
        with pytest.raises(ValueError, match=r"between 0 and the number of steps 4.*max 5"):
            seqjax.unpad_sequence(padded, [4, 2, 5])
