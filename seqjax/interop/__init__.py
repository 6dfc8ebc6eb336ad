"""Weights in and out of other frameworks, without importing them."""

from seqjax.interop.torch import params_from_torch as params_from_torch
from seqjax.interop.torch import params_to_torch as params_to_torch
