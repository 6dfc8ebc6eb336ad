"""Weights in and out of other frameworks, without importing them."""

from seqjax.interop.torch import params_from_torch, params_to_torch

__all__ = ["params_from_torch", "params_to_torch"]
__dir__ = __all__.copy  # What dir() and tab completion show.
