"""examples/port_from_torch.py: the ported classifier equals PyTorch's, and says so."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

PROGRAM = Path(__file__).parents[1] / "examples" / "port_from_torch.py"


def load_program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("port_from_torch", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def program() -> ModuleType:
    pytest.importorskip("torch")
    return load_program()


def test_prints_differences_within_tolerance(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    compared = []
    run = program.run_seqjax

    def record(model: object, *batch: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        outputs, gradients = run(model, *batch)
        compared.append((batch, gradients))
        return outputs, gradients

    monkeypatch.setattr(program, "run_seqjax", record)
    program.main(["--seed", "1", "--smoke"])
    number = r"\d\.\de[-+]\d\d"
    line = rf"largest difference: outputs {number}, gradients {number}\n"
    assert re.fullmatch(line, capsys.readouterr().out)

    # Every parameter and the inputs, with a gradient that is not zero but in the padding.
    [((inputs, lengths, _), gradients)] = compared
    assert len(gradients) == 2 * 2 * 4 + 2 + 1
    assert all(np.abs(gradient).max() > 1e-4 for gradient in gradients.values())
    padding = np.arange(inputs.shape[1]) >= lengths[:, None]
    assert padding.any()
    assert not gradients["inputs"][padding].any()


def test_16_bits_are_close(program: ModuleType, capsys: pytest.CaptureFixture) -> None:
    with jax.numpy_dtype_promotion("standard"):  # As a user has it.
        program.main(["--dtype", "bfloat16"])
    outputs = re.search(r"outputs (\S+),", capsys.readouterr().out)
    assert 1e-5 < float(outputs[1]) < 2e-3  # It does compute in 16 bits.


@pytest.mark.parametrize("differences", [(2e-5, 0.0), (0.0, 2e-5), (np.nan, 0.0), (0.0, np.nan)])
def test_fails_above_the_tolerance(
    program: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    differences: tuple[float, float],
) -> None:
    remaining = iter(differences)
    monkeypatch.setattr(program, "run_seqjax", lambda *args: ({}, {}))
    monkeypatch.setattr(program, "largest_difference", lambda *args: next(remaining))
    with pytest.raises(SystemExit) as exit_:
        program.main([])
    assert exit_.value.code == 1
    assert "above the tolerance of 1.0e-05" in capsys.readouterr().err


def test_largest_difference(program: ModuleType) -> None:
    zeros = {"a": np.zeros(2), "b": np.zeros(2)}
    assert program.largest_difference(zeros | {"a": np.array([0.0, -3.0])}, zeros) == 3
    assert np.isnan(program.largest_difference(zeros | {"b": np.array([np.nan, 0.0])}, zeros))
    with pytest.raises(ValueError, match="names differ"):
        program.largest_difference({"a": np.zeros(2)}, zeros)


def test_weights_go_back_to_torch(program: ModuleType) -> None:
    import torch

    theirs = program.TorchClassifier(features=3, hidden_size=5, classes=2)
    weights = program.Classifier.from_torch(theirs).torch_state_dict()
    assert weights.keys() == theirs.state_dict().keys()
    other = program.TorchClassifier(features=3, hidden_size=5, classes=2)
    other.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    for name, tensor in theirs.state_dict().items():
        np.testing.assert_array_equal(tensor, other.state_dict()[name])


def test_bad_seed(program: ModuleType, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        program.main(["--seed", "-1"])
    assert exit_.value.code == 2
    assert "--seed: expected at least 0, got -1" in capsys.readouterr().err


def test_says_how_to_install_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # Importing it raises ImportError.
    for argv, status, said in [
        (["--smoke"], 2, "PyTorch is needed: pip install torch==2.13.0"),
        (["--help"], 0, "--tolerance TOLERANCE"),
        (["--seed", "x"], 2, "--seed: invalid int value: 'x'"),
    ]:
        monkeypatch.setattr(sys, "argv", [str(PROGRAM), *argv])
        with pytest.raises(SystemExit) as exit_:
            load_program()
        assert exit_.value.code == status
        captured = capsys.readouterr()
        assert said in captured.out + captured.err
