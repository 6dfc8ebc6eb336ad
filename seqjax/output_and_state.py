"""What a module gives back for a sequence."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import jax
from jax.export import register_pytree_node_serialization


@dataclasses.dataclass(frozen=True, eq=False)
class OutputAndState(Sequence[Any]):
    """A pair that unpacks, indexes and is a pytree as a tuple is, and yet is no tuple.

    Flax's `Sequential` spreads a tuple over the arguments of what follows: the final state of one
    layer would silently be the initial state of the next, which so would see the future. This pair
    reaches what follows as one argument, and says what to do where an array is expected. Where JAX
    compares structures, as in `out_axes=(1, 0)`, `tuple(pair)` is one.
    """

    output: Any
    state: Any

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, int | slice):
            self._is_no_array()
        return (self.output, self.state)[index]

    def __iter__(self) -> Iterator[Any]:  # Faster than what a `Sequence` has.
        return iter((self.output, self.state))

    def __len__(self) -> int:
        return 2

    def __eq__(self, other: object) -> bool:
        return tuple(self) == (tuple(other) if isinstance(other, OutputAndState) else other)

    def _is_no_array(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(
            "expected an array, got the pair that a recurrent module gives back: take it apart, "
            "`output, state = module(input)`, and hand on the output. In a Sequential of Flax, "
            "layers one after the other are one `Recurrent(Stack([...]))`, and "
            "`lambda pair: pair[0]` after it hands on its output"
        )

    # What libraries ask of an array, to have it or to see whether it is one.
    __array__ = __jax_array__ = _is_no_array
    dtype = ndim = shape = property(_is_no_array)


jax.tree_util.register_pytree_with_keys(
    OutputAndState,
    lambda pair: ([(jax.tree_util.SequenceKey(i), entry) for i, entry in enumerate(pair)], None),
    lambda _, entries: OutputAndState(*entries),
    lambda pair: ((pair.output, pair.state), None),
)
register_pytree_node_serialization(
    OutputAndState,
    serialized_name="seqjax.OutputAndState",
    serialize_auxdata=lambda _: b"",
    deserialize_auxdata=lambda _: None,
)
