"""Writes the .npz files of this folder from real PyTorch: `python tests/golden/generate.py`.

Every number comes from NumPy's generator with a fixed seed and is computed in float64 on the CPU,
so that a second run writes the same files. Importing this module does not import torch: the tests
read the cases from it.
"""

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from parity import Config, Data, Results, random_data, run_torch

FOLDER = Path(__file__).parent

# No two sizes are equal, so that no swapped pair of axes goes unnoticed.
STEPS, BATCH, INPUT_SIZE, HIDDEN_SIZE, PROJ_SIZE = 6, 4, 3, 5, 2

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {"proj_size": PROJ_SIZE}),
    "gru": ("GRU", {}),
}
STRUCTURES: dict[str, dict[str, Any]] = {
    "one_layer": {},
    "one_layer_bidirectional_no_bias": {"bidirectional": True, "bias": False},
    "two_layers": {"num_layers": 2},
    "two_layers_bidirectional": {"num_layers": 2, "bidirectional": True},
}
LAYERS: dict[str, Config] = {
    f"{kind_name}_{structure_name}": Config(
        kind, input_size=INPUT_SIZE, hidden_size=HIDDEN_SIZE, **options, **structure
    )
    for kind_name, (kind, options) in KINDS.items()
    for structure_name, structure in STRUCTURES.items()
}
"""File name -> layer, each run with all of `LENGTHS`."""

LENGTHS: dict[str, list[int] | None] = {
    "dense": None,
    "ragged": [3, 6, 1, 4],
    "equal": [4, 4, 4, 4],
    "shorter": [2, 4, 1, 3],  # No row fills the input: PyTorch needs total_length for it.
}
"""Name of a run -> lengths to pack with. The padding holds NaN, infinity and a huge number."""

CELLS: dict[str, Config] = {
    name: Config(kind, input_size=INPUT_SIZE, hidden_size=HIDDEN_SIZE, **options)
    for name, (kind, options) in {
        "rnn_cell_tanh": ("RNNCell", {}),
        "rnn_cell_relu": ("RNNCell", {"nonlinearity": "relu"}),
        "rnn_cell_no_bias": ("RNNCell", {"bias": False}),
        "lstm_cell": ("LSTMCell", {}),
        "lstm_cell_no_bias": ("LSTMCell", {"bias": False}),
        "gru_cell": ("GRUCell", {}),
        "gru_cell_no_bias": ("GRUCell", {"bias": False}),
    }.items()
}
"""File name -> cell, each with one run of one step."""

TRAJECTORIES: dict[str, Config] = {
    kind: Config(kind, input_size=4, hidden_size=6, num_layers=2, bidirectional=True)
    for kind in ("RNN", "LSTM", "GRU")
}
"""Kind -> layer under a linear head; the file is called trajectory_ and the kind."""

TRAINING_STEPS, TARGET_SIZE = 100, 3
# Large enough that the loss falls far, and small enough that it falls at every step: past that,
# rounding decides where a run goes.
LEARNING_RATES = {"RNN": 0.15, "LSTM": 0.3, "GRU": 0.3}
TRAINING_LENGTHS = [4, 7, 1, 6, 3]


def make_case(name: str) -> tuple[Config, dict[str, tuple[Data, Results]]]:
    """A layer or cell, and for each run the data and PyTorch's results; all runs share weights."""
    config = (LAYERS | CELLS)[name]
    steps, lengths = (None, {"step": None}) if name in CELLS else (STEPS, LENGTHS)
    seed = zlib.crc32(name.encode())
    data = {run: random_data(config, seed, steps, (BATCH,), lengths[run]) for run in lengths}
    return config, {run: (data[run], run_torch(config, data[run])) for run in data}


def make_trajectory(name: str) -> dict[str, np.ndarray]:
    """Initial weights, data, and the losses of PyTorch's plain gradient descent from there.

    The model is the layer and a linear head at every step; the loss is the mean squared error over
    the valid steps. `losses_float32` is the same run in float32.
    """
    import torch
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    config = TRAJECTORIES[name]
    shape = (max(TRAINING_LENGTHS), len(TRAINING_LENGTHS))
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    data = random_data(config, rng.integers(2**32), shape[0], shape[1:], TRAINING_LENGTHS)
    arrays = {f"weights/{key}": 0.5 * value for key, value in data.weights.items()}
    arrays["head/weight"] = 0.3 * rng.standard_normal((TARGET_SIZE, config.output_size))
    arrays["head/bias"] = 0.3 * rng.standard_normal(TARGET_SIZE)
    arrays["input"] = data.input
    arrays["target"] = rng.standard_normal((*shape, TARGET_SIZE))
    arrays["lengths"] = data.lengths

    def train(dtype: Any) -> tuple[list[float], dict[str, np.ndarray]]:
        layer = config.torch_module()
        layer.load_state_dict(_tensors(arrays, "weights/"))
        head = torch.nn.Linear(config.output_size, TARGET_SIZE)
        head.double().load_state_dict(_tensors(arrays, "head/"))
        model = torch.nn.ModuleList([layer, head]).to(dtype)
        input, target = (torch.from_numpy(arrays[key]).to(dtype) for key in ("input", "target"))
        lengths = torch.from_numpy(arrays["lengths"])
        valid = torch.arange(shape[0])[:, None] < lengths
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATES[name])
        losses = []
        for _ in range(TRAINING_STEPS):
            packed, _ = layer(pack_padded_sequence(input, lengths, enforce_sorted=False))
            output, _ = pad_packed_sequence(packed, total_length=shape[0])
            loss = ((head(output) - target)[valid] ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, {key: value.numpy() for key, value in layer.state_dict().items()}

    losses, trained = train(torch.float64)
    arrays["losses_float64"] = np.array(losses)
    arrays["losses_float32"] = np.array(train(torch.float32)[0], np.float32)
    arrays.update({f"trained/{key}": value for key, value in trained.items()})
    return arrays


def flatten(config: Config, runs: dict[str, tuple[Data, Results]]) -> dict[str, np.ndarray]:
    """One flat dict for an .npz file: the weights once, and the rest under each run's name."""
    arrays = {"config": np.array(json.dumps([config.kind, config.arguments]))}
    for run, (data, results) in runs.items():
        arrays.update({f"weights/{name}": value for name, value in data.weights.items()})
        arrays[f"{run}/input"] = data.input
        if data.lengths is not None:
            arrays[f"{run}/lengths"] = data.lengths
        for group in ("states", "cotangents"):
            for index, value in enumerate(getattr(data, group)):
                arrays[f"{run}/{group}/{index}"] = value
        for index, value in enumerate(results.values):
            arrays[f"{run}/values/{index}"] = value
        for name, value in results.gradients.items():
            arrays[f"{run}/gradients/{name}"] = value
    return arrays


def unflatten(arrays: dict[str, np.ndarray]) -> tuple[Config, dict[str, tuple[Data, Results]]]:
    """The inverse of `flatten`."""

    def group(prefix: str) -> dict[str, np.ndarray]:
        return {
            name.removeprefix(prefix): array
            for name, array in arrays.items()
            if name.startswith(prefix)
        }

    kind, arguments = json.loads(str(arrays["config"]))
    runs = {}
    for run in {name.split("/")[0] for name in arrays} - {"config", "weights"}:
        data = Data(
            group("weights/"),
            arrays[f"{run}/input"],
            tuple(group(f"{run}/states/").values()),
            tuple(group(f"{run}/cotangents/").values()),
            arrays.get(f"{run}/lengths"),
        )
        results = Results(tuple(group(f"{run}/values/").values()), group(f"{run}/gradients/"))
        runs[run] = data, results
    return Config(kind, **arguments), runs


def load(name: str) -> dict[str, np.ndarray]:
    """The arrays of a file of this folder."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def main() -> None:
    """Writes every file."""
    import torch

    torch.set_num_threads(1)  # At these sizes threads wait more than they work.
    for name in [*LAYERS, *CELLS]:
        np.savez_compressed(FOLDER / f"{name}.npz", **flatten(*make_case(name)))
    for kind in TRAJECTORIES:
        np.savez_compressed(FOLDER / f"trajectory_{kind}.npz", **make_trajectory(kind))
    files = list(FOLDER.glob("*.npz"))
    print(f"{len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.2f} MB")


def _tensors(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, Any]:
    import torch

    return {
        key.removeprefix(prefix): torch.from_numpy(value.copy())
        for key, value in arrays.items()
        if key.startswith(prefix)
    }


if __name__ == "__main__":
    main()
