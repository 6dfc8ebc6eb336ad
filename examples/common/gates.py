"""What the gates of an LSTM do over a sequence."""

import jax
import jax.numpy as jnp

import seqjax


def lstm_gates(
    cell: seqjax.LSTMCell, params: seqjax.LSTMParams, xs: jax.Array
) -> dict[str, jax.Array]:
    """Gates and state of an LSTM at every step of a sequence, from a state of zeros.

    Args:
      cell: the LSTM,
      params: and its parameters.
      xs: one sequence, `(T, input_size)`.

    Returns:
      By name, each `(T, hidden_size)`: the gates `i`, `f` and `o` in (0, 1), the candidate `g` in
      (-1, 1), and the state `c`. The equations are those of `seqjax.LSTMCell`.
    """

    def step(carry: seqjax.LSTMCarry, x: jax.Array) -> tuple[seqjax.LSTMCarry, dict]:
        products = x @ params.w_ih + carry.h @ params.w_hh
        if params.b_ih is not None:
            products += params.b_ih + params.b_hh
        i, f, g, o = jnp.split(products, 4)
        seen = {"i": jax.nn.sigmoid(i), "f": jax.nn.sigmoid(f), "o": jax.nn.sigmoid(o)}
        carry, _ = cell.step(params, carry, x)
        return carry, {**seen, "g": jnp.tanh(g), "c": carry.c}

    return jax.lax.scan(step, cell.initial_carry((), xs.dtype), xs)[1]
