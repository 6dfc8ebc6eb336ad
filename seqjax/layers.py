"""Layers made of layers: one after the other, and one in each direction."""

import dataclasses
import itertools
import numbers
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from seqjax.cells.base import Carry, Layer, Params, check_layer, exportable, run_layer
from seqjax.ops.sharding import shard_like

__all__ = ["Bidirectional", "BidirectionalCarry", "BidirectionalParams", "Stack"]
__dir__ = __all__.copy  # What dir() and tab completion show.


@exportable
class BidirectionalParams(NamedTuple):
    """Parameters of a `Bidirectional` layer."""

    forward: Params
    backward: Params


@exportable
class BidirectionalCarry(NamedTuple):
    """State of a `Bidirectional` layer; `backward` is the state at the sequence's first step."""

    forward: Carry
    backward: Carry


@dataclasses.dataclass(frozen=True)
class Stack(Layer[tuple[Params, ...], tuple[Carry, ...]]):
    """Layers one after the other: each reads the outputs of the one before.

    Parameters and carry are tuples with one entry a layer. In training (a key given to
    `seqjax.scan`) each output but the last one's goes through dropout: an element is zeroed with
    probability `dropout`, drawn afresh for every step and row, and the rest scaled by
    `1 / (1 - dropout)`. States are never dropped.

    Args:
      layers: the layers, first to last; at least one.
      dropout: probability in [0, 1].

    Raises:
      TypeError: an entry is not a layer.
      ValueError: no layers, sizes that do not chain, or dropout out of range.

    >>> import jax, seqjax
    >>> stack = seqjax.Stack([seqjax.GRUCell(3, 5), seqjax.LSTMCell(5, 4)], dropout=0.2)
    >>> params = stack.init(jax.random.key(0))
    >>> carry, ys = seqjax.scan(stack, params, jax.numpy.ones((7, 2, 3)))
    >>> ys.shape
    (7, 2, 4)
    """

    layers: tuple[Layer, ...]
    dropout: float = 0.0
    input_size: int = dataclasses.field(init=False, repr=False, compare=False)
    zeroes_padding: ClassVar[bool] = True  # Each of its layers sees zeros.

    def __init__(self, layers: Sequence[Layer], dropout: float = 0.0) -> None:
        layers = tuple(layers)
        if not layers:
            raise ValueError("Stack needs at least one layer, got none")
        for index, layer in enumerate(layers):
            check_layer(f"layers[{index}]", layer)
        for index, (below, above) in enumerate(itertools.pairwise(layers)):
            if below.output_size != above.input_size:
                raise ValueError(
                    f"layers[{index}] has output_size {below.output_size}, but layers[{index + 1}] "
                    f"expects input_size {above.input_size}: make them equal"
                )
        check_dropout(dropout)
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "dropout", float(dropout))
        object.__setattr__(self, "input_size", layers[0].input_size)

    @property
    def output_size(self) -> int:
        return self.layers[-1].output_size

    @property
    def draws_dropout(self) -> bool:
        between = self.dropout > 0 and len(self.layers) > 1
        return between or any(layer.draws_dropout for layer in self.layers)

    def init(self, key: jax.Array, dtype: DTypeLike = jnp.float32) -> tuple[Params, ...]:
        """Draws each layer's parameters."""
        keys = jax.random.split(key, len(self.layers))
        return tuple(layer.init(k, dtype) for layer, k in zip(self.layers, keys, strict=True))

    def initial_carry(
        self, batch_shape: tuple[int, ...] = (), dtype: DTypeLike = jnp.float32
    ) -> tuple[Carry, ...]:
        """Each layer's zero state."""
        return tuple(layer.initial_carry(batch_shape, dtype) for layer in self.layers)

    def step(
        self, params: tuple[Params, ...], carry: tuple[Carry, ...], x: jax.Array
    ) -> tuple[tuple[Carry, ...], jax.Array]:
        """One time step through every layer, without dropout."""
        new_carry = []
        for layer, layer_params, layer_carry in zip(self.layers, params, carry, strict=True):
            layer_carry, x = layer.step(layer_params, layer_carry, x)
            new_carry.append(layer_carry)
        return tuple(new_carry), x

    def run(
        self,
        params: tuple[Params, ...],
        carry: tuple[Carry, ...],
        xs: jax.Array,
        *,
        key: jax.Array | None,
        **options: Any,
    ) -> tuple[tuple[Carry, ...], jax.Array]:
        new_carry = []
        entries = zip(self.layers, params, carry, strict=True)
        for index, (layer, layer_params, layer_carry) in enumerate(entries):
            layer_key = dropout_key = None
            if key is not None:
                layer_key, dropout_key = jax.random.split(jax.random.fold_in(key, index))
            if index > 0 and dropout_key is not None:
                xs = _drop(dropout_key, xs, self.dropout)
            layer_carry, xs = run_layer(
                layer, layer_params, layer_carry, xs, key=layer_key, **options
            )
            new_carry.append(layer_carry)
        return tuple(new_carry), xs


@dataclasses.dataclass(frozen=True)
class Bidirectional(Layer[BidirectionalParams, BidirectionalCarry]):
    """Two layers over the same sequence, the second in reversed time; features are concatenated.

    Outputs are `[forward, backward]` on the feature axis. With a mask the backward layer starts
    at each row's last valid step. Parameters and carry have the fields `forward` and `backward`.

    Args:
      forward: layer that reads the sequence first to last.
      backward: layer that reads it last to first.

    Raises:
      TypeError: an argument is not a layer.
      ValueError: the two differ in input_size.

    >>> import jax, seqjax
    >>> layer = seqjax.Bidirectional(seqjax.GRUCell(3, 5), seqjax.GRUCell(3, 5))
    >>> carry, ys = seqjax.scan(layer, layer.init(jax.random.key(0)), jax.numpy.ones((7, 2, 3)))
    >>> ys.shape, carry.backward.shape
    ((7, 2, 10), (2, 5))
    """

    forward: Layer
    backward: Layer
    input_size: int = dataclasses.field(init=False, repr=False, compare=False)
    zeroes_padding: ClassVar[bool] = True  # Each of its layers sees zeros.

    def __post_init__(self) -> None:
        check_layer("forward", self.forward)
        check_layer("backward", self.backward)
        if self.forward.input_size != self.backward.input_size:
            raise ValueError(
                "forward and backward read the same input, but their input_size differs: "
                f"got {self.forward.input_size} and {self.backward.input_size}"
            )
        object.__setattr__(self, "input_size", self.forward.input_size)

    @property
    def output_size(self) -> int:
        return self.forward.output_size + self.backward.output_size

    @property
    def draws_dropout(self) -> bool:
        return self.forward.draws_dropout or self.backward.draws_dropout

    def init(self, key: jax.Array, dtype: DTypeLike = jnp.float32) -> BidirectionalParams:
        """Draws both directions' parameters."""
        forward_key, backward_key = jax.random.split(key)
        return BidirectionalParams(
            self.forward.init(forward_key, dtype), self.backward.init(backward_key, dtype)
        )

    def initial_carry(
        self, batch_shape: tuple[int, ...] = (), dtype: DTypeLike = jnp.float32
    ) -> BidirectionalCarry:
        """Both directions' zero state."""
        return BidirectionalCarry(
            self.forward.initial_carry(batch_shape, dtype),
            self.backward.initial_carry(batch_shape, dtype),
        )

    def step(self, params: Params, carry: Carry, x: jax.Array) -> tuple[Carry, jax.Array]:
        """Raises: the backward direction needs the whole sequence."""
        raise ValueError(
            "Bidirectional has no step: its backward direction starts at the end of the sequence, "
            "so no output is known before all inputs are. Use seqjax.scan over the whole sequence, "
            "or a layer without Bidirectional for step-by-step decoding."
        )

    def run(
        self,
        params: BidirectionalParams,
        carry: BidirectionalCarry,
        xs: jax.Array,
        *,
        reverse: bool,
        key: jax.Array | None,
        **options: Any,
    ) -> tuple[BidirectionalCarry, jax.Array]:
        forward_key = backward_key = None
        if key is not None:
            forward_key, backward_key = jax.random.split(key)
        forward_carry, forward_ys = run_layer(
            self.forward, params.forward, carry.forward, xs,
            reverse=reverse, key=forward_key, **options,
        )  # fmt: skip
        backward_carry, backward_ys = run_layer(
            self.backward, params.backward, carry.backward, xs,
            reverse=not reverse, key=backward_key, **options,
        )  # fmt: skip
        ys = jnp.concatenate([forward_ys, backward_ys], axis=-1)
        return BidirectionalCarry(forward_carry, backward_carry), ys


def check_dropout(dropout: object) -> None:
    """Raises PyTorch's error unless `dropout` is a number in [0, 1] and not a bool."""
    is_number = isinstance(dropout, numbers.Real) and not isinstance(dropout, bool)
    if not is_number or not 0 <= dropout <= 1:  # type: ignore[operator]
        raise ValueError(
            "dropout should be a number in range [0, 1] representing the probability of an "
            f"element being zeroed, got: {dropout!r}"
        )


def _drop(key: jax.Array, values: jax.Array, rate: float) -> jax.Array:
    """Zeroes elements with probability `rate` and scales the rest by `1 / (1 - rate)`."""
    if rate == 0:
        return values
    if rate == 1:  # No scale makes up for it, and 1 / (1 - rate) would be NaN in the gradient.
        return jnp.zeros_like(values)
    keep = shard_like(jax.random.bernoulli(key, 1 - rate, values.shape), values)
    return jnp.where(keep, values / (1 - rate), jnp.zeros_like(values))
