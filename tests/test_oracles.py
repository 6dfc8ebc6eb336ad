"""Against the recurrent layers of other libraries, with the same weights.

Flax knows right padding, given as lengths; Keras knows masks, gaps included. Both are written
independently of seqjax and of each other. They use another number of biases, order of gates or
layout, which the functions here translate.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import seqjax

LENGTHS = np.array([6, 3, 1, 5, 2, 4])
RIGHT_PADDED = np.array([[step < length for length in LENGTHS] for step in range(6)])
CELLS = {
    "rnn": seqjax.RNNCell(3, 5),
    "lstm": seqjax.LSTMCell(3, 5),
    "gru": seqjax.GRUCell(3, 5),
}
each_cell = pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)


@contextlib.contextmanager
def as_its_authors_run_it() -> Iterator[None]:
    """The oracle's own code neither has to be free of warnings nor of promotion."""
    with (
        warnings.catch_warnings(),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        warnings.simplefilter("ignore")
        yield


def compare(
    layer: seqjax.Layer,
    mask: np.ndarray,
    oracle: Callable[[Any, jax.Array, Any], tuple[Any, jax.Array]],
    edit: Callable[[Any], Any] = lambda params: params,
) -> None:
    """Final state, valid outputs, and gradients of inputs and initial state, in float64.

    Args:
      layer: the layer.
      mask: bool `(6, 6)`.
      oracle: `(params, xs, carry) -> (carry, ys)` by the other library.
      edit: changes parameters that the oracle lacks.
    """
    case = contract.make_case(layer, dtype=np.float64)
    case = case._replace(params=edit(case.params))
    carry_cotangent, ys_cotangent = case.cotangents
    # What the oracle gives at padded steps is its own affair.
    case = case._replace(cotangents=(carry_cotangent, ys_cotangent * mask[..., None]))

    @contract.quick_jit
    def run(xs: Any, carry: Any) -> Any:
        (new_carry, ys), pullback = jax.vjp(
            lambda xs, carry: oracle(case.params, xs, carry), xs, carry
        )
        return new_carry, ys, *pullback((case.cotangents[0], jnp.asarray(case.cotangents[1])))

    with as_its_authors_run_it():
        expected_carry, expected_ys, xs_grad, carry_grad = jax.device_get(run(case.xs, case.carry))
    got = contract.evaluate(layer, case, mask)
    contract.assert_close(got.ys[mask], expected_ys[mask], 1e-11)
    contract.assert_close(got.carry, expected_carry, 1e-11)
    contract.assert_close(got.grads.xs[mask], xs_grad[mask], 1e-10)
    contract.assert_close(got.grads.carry, carry_grad, 1e-10)


class TestFlaxLinen:
    """Flax puts the LSTM's bias with h, the RNN's and GRU's with x, and the GRU's b_hn with h."""

    def variables(self, cell: Any, params: Any) -> dict[str, Any]:
        size = cell.hidden_size
        summed = params.b_ih + params.b_hh

        def gate(array: Any, index: int) -> Any:
            return array[..., index * size : (index + 1) * size]

        match cell:
            case seqjax.RNNCell():
                tree = {"i": {"kernel": params.w_ih, "bias": summed}, "h": {"kernel": params.w_hh}}
            case seqjax.LSTMCell():
                tree = {}
                for index, name in enumerate("ifgo"):
                    tree[f"i{name}"] = {"kernel": gate(params.w_ih, index)}
                    tree[f"h{name}"] = {
                        "kernel": gate(params.w_hh, index),
                        "bias": gate(summed, index),
                    }
            case seqjax.GRUCell():
                tree = {}
                for index, name in enumerate("rzn"):
                    tree[f"i{name}"] = {
                        "kernel": gate(params.w_ih, index),
                        "bias": gate(summed if name != "n" else params.b_ih, index),
                    }
                    tree[f"h{name}"] = {"kernel": gate(params.w_hh, index)}
                tree["hn"]["bias"] = gate(params.b_hh, 2)
        return {"params": {"cell": tree}}

    def module(self, cell: Any, **options: Any) -> linen.RNN:
        kinds = {
            seqjax.RNNCell: linen.SimpleCell,
            seqjax.LSTMCell: linen.OptimizedLSTMCell,
            seqjax.GRUCell: linen.GRUCell,
        }
        flax_cell = kinds[type(cell)](features=cell.hidden_size, param_dtype=jnp.float64)
        return linen.RNN(flax_cell, time_major=True, return_carry=True, **options)

    def run(self, cell: Any, **options: Any) -> Any:
        def oracle(params: Any, xs: jax.Array, carry: Any) -> Any:
            if isinstance(cell, seqjax.LSTMCell):
                carry = (carry.c, carry.h)
            carry, ys = self.module(cell, **options).apply(
                self.variables(cell, params), xs, initial_carry=carry, seq_lengths=LENGTHS
            )
            if isinstance(cell, seqjax.LSTMCell):
                carry = seqjax.LSTMCarry(h=carry[1], c=carry[0])
            return carry, ys

        return oracle

    @each_cell
    def test_forward(self, cell: seqjax.Cell, x64: None) -> None:
        compare(cell, RIGHT_PADDED, self.run(cell))

    def test_bidirectional(self, x64: None) -> None:
        layer = seqjax.Bidirectional(CELLS["lstm"], CELLS["gru"])
        forward = self.run(layer.forward)
        backward = self.run(layer.backward, reverse=True, keep_order=True)

        def oracle(params: Any, xs: jax.Array, carry: Any) -> Any:
            forward_carry, forward_ys = forward(params.forward, xs, carry.forward)
            backward_carry, backward_ys = backward(params.backward, xs, carry.backward)
            ys = jnp.concatenate([forward_ys, backward_ys], axis=-1)
            return seqjax.BidirectionalCarry(forward_carry, backward_carry), ys

        compare(layer, RIGHT_PADDED, oracle)


class TestFlaxNNX:
    def test_lstm(self, x64: None) -> None:
        def oracle(params: Any, xs: jax.Array, carry: Any) -> Any:
            cell = nnx.OptimizedLSTMCell(3, 5, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
            cell.dense_i.kernel = nnx.Param(params.w_ih)
            cell.dense_h.kernel = nnx.Param(params.w_hh)
            cell.dense_h.bias = nnx.Param(params.b_ih + params.b_hh)
            (c, h), ys = nnx.RNN(cell, time_major=True, return_carry=True)(
                xs, initial_carry=(carry.c, carry.h), seq_lengths=LENGTHS
            )
            return seqjax.LSTMCarry(h, c), ys

        compare(CELLS["lstm"], RIGHT_PADDED, oracle)

    def test_gru(self, x64: None) -> None:
        """NNX's GRU has no b_hn."""

        def oracle(params: Any, xs: jax.Array, carry: Any) -> Any:
            cell = nnx.GRUCell(3, 5, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
            cell.dense_i.kernel = nnx.Param(params.w_ih)
            cell.dense_i.bias = nnx.Param(params.b_ih + params.b_hh)
            cell.dense_h.kernel = nnx.Param(params.w_hh)
            return nnx.RNN(cell, time_major=True, return_carry=True)(
                xs, initial_carry=carry, seq_lengths=LENGTHS
            )

        def without_b_hn(params: Any) -> Any:
            return params._replace(b_hh=np.concatenate([params.b_hh[:10], np.zeros(5)]))

        compare(CELLS["gru"], RIGHT_PADDED, oracle, without_b_hn)


class TestKeras:
    """Keras orders the GRU's gates z r n, and masks steps wherever they stand."""

    @pytest.fixture
    def keras(self) -> Any:
        os.environ.setdefault("KERAS_BACKEND", "jax")
        with as_its_authors_run_it():
            keras = pytest.importorskip("keras")
        if keras.backend.backend() != "jax":
            pytest.skip(f"Keras runs on {keras.backend.backend()}, not on JAX")
        return keras

    def weights(self, cell: Any, params: Any) -> list[Any]:
        if not isinstance(cell, seqjax.GRUCell):
            return [params.w_ih, params.w_hh, params.b_ih + params.b_hh]

        def z_first(array: Any) -> Any:
            r, z, n = np.split(array, 3, axis=-1)
            return np.concatenate([z, r, n], axis=-1)

        biases = np.stack([z_first(params.b_ih), z_first(params.b_hh)])
        return [z_first(params.w_ih), z_first(params.w_hh), biases]

    def run(self, keras: Any, cell: Any, mask: np.ndarray, **options: Any) -> Any:
        kinds = {
            seqjax.RNNCell: keras.layers.SimpleRNN,
            seqjax.LSTMCell: keras.layers.LSTM,
            seqjax.GRUCell: keras.layers.GRU,
        }
        if isinstance(cell, seqjax.GRUCell):
            options["reset_after"] = True

        def oracle(params: Any, xs: jax.Array, carry: Any) -> Any:
            layer = kinds[type(cell)](
                cell.hidden_size,
                return_sequences=True,
                return_state=True,
                zero_output_for_mask=True,
                activation=jnp.tanh,  # Keras's own computes in float32.
                dtype="float64",
                **options,
            )
            layer.build((None, None, cell.input_size))
            (ys, *states), _ = layer.stateless_call(
                self.weights(cell, params),
                [variable.value for variable in layer.non_trainable_variables],
                jnp.swapaxes(xs, 0, 1),
                initial_state=jax.tree.leaves(carry),
                mask=jnp.asarray(mask.T),
            )
            ys = jnp.swapaxes(ys, 0, 1)
            if options.get("go_backwards"):
                ys = ys[::-1]
            return jax.tree.unflatten(jax.tree.structure(carry), states), ys

        return oracle

    @each_cell
    def test_forward(self, keras: Any, cell: seqjax.Cell, x64: None) -> None:
        compare(cell, contract.MASK, self.run(keras, cell, contract.MASK))

    def test_bidirectional(self, keras: Any, x64: None) -> None:
        layer = seqjax.Bidirectional(CELLS["lstm"], CELLS["gru"])
        forward = self.run(keras, layer.forward, contract.MASK)
        backward = self.run(keras, layer.backward, contract.MASK, go_backwards=True)

        def oracle(params: Any, xs: jax.Array, carry: Any) -> Any:
            forward_carry, forward_ys = forward(params.forward, xs, carry.forward)
            backward_carry, backward_ys = backward(params.backward, xs, carry.backward)
            ys = jnp.concatenate([forward_ys, backward_ys], axis=-1)
            return seqjax.BidirectionalCarry(forward_carry, backward_carry), ys

        compare(layer, contract.MASK, oracle)
