"""What PyTorch's modules are: their kind, configuration and weights."""

import inspect
from collections.abc import Iterable
from typing import Any

import numpy as np

from seqjax.interop.state_dicts import ENTRY, one_dtype, to_arrays


def torch_kind(torch_module: Any, kinds: Iterable[str]) -> str:
    """Which of the `torch.nn` classes named in `kinds` a module is an instance of.

    Raises:
      TypeError: none of them.
    """
    expected = [*kinds]
    if (kind := _kind_of(torch_module)) in expected:
        return kind
    wrong = type(torch_module)
    names = " or ".join(f"torch.nn.{kind}" for kind in expected)
    if wrong.__module__.startswith("torch.") and "quantiz" in wrong.__module__:
        raise TypeError(
            f"expected a {names}, got: {wrong.__module__}.{wrong.__name__}, which is quantised: "
            "give the module that it was made from"
        )
    message = f"expected a {names}, got: {wrong.__name__}"
    if any(base.__module__ == "torch.nn.modules.module" for base in wrong.__mro__):
        modules = torch_module.named_modules()
        if inside := [path for path, module in modules if _kind_of(module) in expected]:
            message += f". It has such modules inside, give one of them: {', '.join(inside)}"
    raise TypeError(message)


def _kind_of(torch_module: Any) -> str | None:
    """The name of the module's class in `torch.nn`, whose recurrent ones all stand in one file.

    Quantised ones have the same names in other files.
    """
    bases = type(torch_module).__mro__
    names = [base.__name__ for base in bases if base.__module__ == "torch.nn.modules.rnn"]
    return names[0] if names else None


def torch_arguments(torch_module: Any, kind: type) -> dict[str, Any]:
    """What to call `kind` with so that it has the configuration and dtype of a PyTorch module.

    The positional arguments of our constructors are attributes of PyTorch's modules.

    Raises:
      ValueError: its weights hold no numbers, or have several dtypes.
    """
    parameters = inspect.signature(kind.__init__).parameters.values()  # type: ignore[misc]
    arguments = {
        parameter.name: getattr(torch_module, parameter.name)
        for parameter in parameters
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and parameter.name not in ("self", "parent", "name")  # Flax's own, in linen.
    }
    weights = weights_in_effect(torch_module)
    arrays = to_arrays({name: value for name, value in weights.items() if ENTRY.fullmatch(name)})
    # Without any, loading says what is missing.
    return arguments | {"param_dtype": one_dtype(arrays) if arrays else np.dtype("float32")}


def weights_in_effect(torch_module: Any) -> dict[str, Any]:
    """The state dict of a PyTorch module, with the weights that it computes with in eval mode.

    Where PyTorch makes a weight of others (`weight_norm`, `prune`, `parametrize`), the state dict
    itself holds those, and the module's attribute what a call before has made of them.
    """
    weights = dict(torch_module.state_dict())
    made = [*getattr(torch_module, "parametrizations", {})]
    modes = {module: module.training for module in torch_module.modules()}
    try:
        for module in modes:
            module.training = False  # A spectral norm would go on with its power iteration.
        for hook in torch_module._forward_pre_hooks.values():
            kinds = type(hook).__mro__
            if any(kind.__module__.startswith("torch.nn.utils.") for kind in kinds):
                hook(torch_module, ())
                made.append(getattr(hook, "name", None) or hook._tensor_name)
        weights |= {name: getattr(torch_module, name) for name in made}
    finally:
        for module, training in modes.items():
            module.training = training
    parts = {f"{name}_{part}" for name in made for part in ("g", "v", "u", "orig", "mask")}
    return {
        name: weight
        for name, weight in weights.items()
        if name not in parts and not name.startswith("parametrizations.")
    }
