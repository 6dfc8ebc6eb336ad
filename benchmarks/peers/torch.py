"""PyTorch: `nn.LSTM`, `nn.GRU` and `nn.RNN`, packed sequences for ragged rows, and the cells."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from benchmarks.cases import Case
from benchmarks.data import Data
from benchmarks.peers import program


class Peer(program.Peer):
    """torch."""

    distribution = "torch"

    def __init__(self, settings: program.Settings) -> None:
        super().__init__(settings)
        torch.set_num_threads(settings.threads)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        self.device = {"cpu": "cpu", "gpu": "cuda"}[settings.device]
        if settings.device == "gpu" and not torch.cuda.is_available():
            raise RuntimeError("PyTorch finds no gpu")

    def clear(self) -> None:
        """Nothing is compiled."""

    def program(self, case: Case, data: Data) -> "TorchProgram":
        def tensor(array: np.ndarray) -> torch.Tensor:
            dtype = getattr(torch, self.settings.dtype)
            return torch.from_numpy(array).to(self.device, dtype)

        make = {"forward": _forward, "train": _train, "step": _step, "decode": _decode}[case.mode]
        return make(case, data, tensor)


class TorchProgram:
    """A function that returns its results as a list of tensors; see `Program`."""

    memory = None  # There is no compiler to ask.

    def __init__(self, function: Callable[[], Any], values: Callable[[], list[Any]]) -> None:
        self.function = function
        self.tensors = values
        start = time.perf_counter()
        self.call()
        self.first_call = time.perf_counter() - start

    def call(self) -> Any:
        result = self.function()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return result

    def values(self) -> list[np.ndarray]:
        tensors = [tensor.detach().cpu() for tensor in self.tensors()]
        return [(t.double() if t.is_floating_point() else t).numpy() for t in tensors]


def _forward(case: Case, data: Data, tensor: Callable[..., Any]) -> TorchProgram:
    run = _sequence(case, data, _layer(case, data, tensor))
    xs, mask = tensor(data.xs), tensor(data.mask)

    @torch.inference_mode()
    def forward() -> Any:
        return run(xs)

    def values() -> list[Any]:
        output, state = forward()
        states = state if case.cell == "LSTM" else (state,)
        # By layer and direction, and there h before c.
        return [output * mask, *(part for parts in zip(*states, strict=True) for part in parts)]

    return TorchProgram(forward, values)


def _train(case: Case, data: Data, tensor: Callable[..., Any]) -> TorchProgram:
    layer = _layer(case, data, tensor)
    run = _sequence(case, data, layer)
    xs, cotangent = tensor(data.xs), tensor(data.cotangent)
    parameters = list(layer.parameters())

    def train() -> None:
        for parameter in parameters:
            parameter.grad = None
        (run(xs)[0] * cotangent).sum().backward()

    def values() -> list[Any]:
        train()
        grads = []
        for suffix in _suffixes(case):
            grads.append(getattr(layer, f"weight_ih_{suffix}").grad.T)
            grads.append(getattr(layer, f"weight_hh_{suffix}").grad.T)
            grads.append(getattr(layer, f"bias_ih_{suffix}").grad)
        return grads

    return TorchProgram(train, values)


def _step(case: Case, data: Data, tensor: Callable[..., Any]) -> TorchProgram:
    cell = _cell(case, data, tensor)
    x, zeros = tensor(data.xs[0]), tensor(np.zeros((1, case.hidden_size)))
    initial = (zeros, zeros) if case.cell == "LSTM" else zeros

    @torch.inference_mode()
    def steps() -> Any:
        state = initial
        for _ in range(case.time):
            state = cell(x, state)
        return state

    return TorchProgram(steps, lambda: [_output(steps())])


def _decode(case: Case, data: Data, tensor: Callable[..., Any]) -> TorchProgram:
    cell = _cell(case, data, tensor)
    embedding, head = tensor(data.embedding), tensor(data.head)
    zeros = tensor(np.zeros((1, case.hidden_size)))
    initial = (zeros, zeros) if case.cell == "LSTM" else zeros
    start = torch.zeros(1, dtype=torch.int64, device=zeros.device)

    @torch.inference_mode()
    def decode() -> torch.Tensor:
        state, token, tokens = initial, start, []
        for _ in range(case.time):
            state = cell(embedding[token], state)
            token = (_output(state) @ head).argmax(-1)
            tokens.append(token)
        return torch.stack(tokens)

    return TorchProgram(decode, lambda: [decode()])


def _output(state: Any) -> torch.Tensor:
    return state[0] if isinstance(state, tuple) else state


def _suffixes(case: Case) -> list[str]:
    """By layer and direction, what PyTorch's parameter names end with."""
    directions = ["", "_reverse"][: case.num_directions]
    return [f"l{layer}{end}" for layer in range(case.num_layers) for end in directions]


def _layer(case: Case, data: Data, tensor: Callable[..., Any]) -> nn.Module:
    layer = getattr(nn, case.cell)(
        case.input_size,
        case.hidden_size,
        case.num_layers,
        bidirectional=case.bidirectional,
    )
    cells = [cell for directions in data.weights for cell in directions]
    for suffix, weights in zip(_suffixes(case), cells, strict=True):
        _load(layer, f"_{suffix}", weights, tensor)
    layer.flatten_parameters()
    return layer


def _cell(case: Case, data: Data, tensor: Callable[..., Any]) -> nn.Module:
    cell = getattr(nn, f"{case.cell}Cell")(case.input_size, case.hidden_size)
    _load(cell, "", data.weights[0][0], tensor)
    return cell


def _load(module: nn.Module, suffix: str, weights: Any, tensor: Callable[..., Any]) -> None:
    for name, array in {
        "weight_ih": weights.w_ih.T,
        "weight_hh": weights.w_hh.T,
        "bias_ih": weights.bias,
        "bias_hh": np.zeros_like(weights.bias),
    }.items():
        setattr(module, name + suffix, nn.Parameter(tensor(array).contiguous()))


def _sequence(case: Case, data: Data, layer: nn.Module) -> Callable[[torch.Tensor], Any]:
    if data.lengths is None:
        return layer
    lengths = torch.from_numpy(data.lengths).long()  # Packing wants them on the CPU.

    def packed(xs: torch.Tensor) -> Any:
        output, state = layer(pack_padded_sequence(xs, lengths, enforce_sorted=False))
        return pad_packed_sequence(output, total_length=case.time)[0], state

    return packed
