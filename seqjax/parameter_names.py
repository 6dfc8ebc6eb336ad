"""One name for every parameter of a layer, shared by the Flax shells.

`Stack` entries are called `layers_0`, `layers_1`, …; everything else by its field. The names of a
bidirectional two-layer LSTM are thus `layers_0/forward/w_ih` to `layers_1/backward/b_hh`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from seqjax.cells.base import Layer, Params
from seqjax.cells.checks import abstract_params, key_name


def params_to_dict(params: Params) -> dict[str, Any]:
    """Nested dicts of the parameters' leaves by name.

    Raises:
      TypeError: the parameters are a lone array, which has no name.
    """
    tree: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not path:
            raise TypeError(
                "a layer's parameters should be a NamedTuple, tuple or dict of arrays, so that "
                f"each has a name; got a lone {type(leaf).__name__}"
            )
        *parents, name = (key_name(entry) for entry in path)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def params_from_dict(
    layer: Layer, tree: Mapping[str, Any], read: Callable[[Any], Any] = lambda leaf: leaf
) -> Params:
    """The inverse of `params_to_dict` for the parameters of `layer`; other names are ignored.

    `read` gets a parameter out of what the tree holds under its name.
    """

    def find(path: tuple[Any, ...], _: Any) -> Any:
        node: Any = tree
        for entry in path:
            node = node[key_name(entry)]
        return read(node)

    return jax.tree_util.tree_map_with_path(find, abstract_params(layer))
