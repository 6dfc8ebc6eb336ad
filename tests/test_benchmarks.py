"""benchmarks/: its cases, what the peers compute, the arithmetic on times, and the reports."""

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import cases, peers, report, results, run
from benchmarks.cases import Case
from benchmarks.data import largest_error, make_data
from benchmarks.peers.program import Settings
from benchmarks.targets import TARGETS, Target

TINY = [
    Case("layer", "LSTM", "train", 3, 4, 5, 6),
    Case("layer", "GRU", "train", 3, 4, 5, 6),
    Case("layer", "RNN", "forward", 3, 4, 5, 6),
    Case("bidirectional", "LSTM", "forward", 3, 4, 5, 6, 2, True, True),
    Case("decode_step", "GRU", "step", 1, 3, 5, 5),
    Case("decode", "RNN", "decode", 1, 9, 5, 6),
    Case("full_lengths", "GRU", "forward", 3, 4, 5, 6),
    Case("vmap", "LSTM", "train", 3, 4, 5, 6),
]


@pytest.fixture(autouse=True, scope="module")
def _settings() -> Iterator[None]:
    """Workers set these for their whole process; here other tests follow."""
    names = ("jax_enable_x64", "jax_platforms")
    before = {name: getattr(jax.config, name) for name in names}
    os.environ.setdefault("KERAS_BACKEND", "jax")
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@contextlib.contextmanager
def as_its_authors_run_it() -> Iterator[None]:
    """The peers' own code neither has to be free of warnings nor of promotion."""
    with (
        warnings.catch_warnings(),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def references() -> dict[str, list[np.ndarray]]:
    peer = peers.load(peers.REFERENCE, Settings(dtype="float64"))
    return {case.name: peer.program(case, make_data(case, "float32")).values() for case in TINY}


def test_case_names_are_unique() -> None:
    names = [case.name for case in cases.ALL_CASES]
    assert len(set(names)) == len(names)


def test_cases_cover_the_list() -> None:
    names = {case.name for case in cases.ALL_CASES}
    for cell in ("LSTM", "GRU", "RNN"):
        for shape in cases.LAYER_SHAPES:
            for mode in ("forward", "train"):
                assert f"{cell}-{'x'.join(map(str, shape))}-{mode}" in names
        assert f"ragged-{cell}-32x512x64x64-train" in names
        assert f"bidirectional-{cell}-64x28x28x256-forward" in names
        assert f"full_lengths-{cell}-20x35x200x200-train" in names
        assert f"vmap-{cell}-20x35x200x200-train" in names
        assert f"devices-{cell}-256x50x64x64-train" in names
        assert f"decode_step-{cell}-1x100x512x512-step" in names
        assert f"decode-{cell}-1x200x64x256-decode" in names
    assert len(cases.LAYER_SHAPES) == 10
    assert {case.batch for case in cases.select(["GRU"], ["ragged"])} == {20, 32, 64}


def test_select_takes_groups_and_parts_of_names() -> None:
    assert {case.group for case in cases.select(patterns=["vmap"])} == {"vmap"}
    found = cases.select(["LSTM"], ["32x28x28x128-train"])
    assert {case.group for case in found} == {"layer", "full_lengths", "vmap", "devices"}
    with pytest.raises(ValueError, match="no case is in group, or has in its name, 'lstm'"):
        cases.select(patterns=["lstm"])


def test_lengths_are_unsorted_and_mask_the_cotangent() -> None:
    data = make_data(cases.select(["LSTM"], ["ragged"])[0], "float32")
    assert data.lengths is not None
    assert (data.lengths >= 1).all()
    assert (data.lengths <= 512).all()
    assert (np.diff(data.lengths) > 0).any()
    assert (np.diff(data.lengths) < 0).any()
    np.testing.assert_array_equal(data.mask[..., 0].sum(0), data.lengths)
    assert not (data.cotangent * (1 - data.mask)).any()


def test_largest_error() -> None:
    reference = [np.array([1.0, -2.0]), np.array([100.0])]
    assert largest_error([np.array([1.0, -2.1]), np.array([101.0])], reference) == (
        pytest.approx(0.05)
    )
    tokens = np.array([1, 2, 3, 4])
    assert largest_error([np.array([1, 2, 4, 4])], [tokens]) == 0.25
    with pytest.raises(ValueError, match=r"a result has shape \(1,\), the reference \(2,\)"):
        largest_error([np.ones(1)], [np.ones(2)])


@pytest.mark.parametrize("name", [peers.BASELINE, *peers.VARIANTS.values(), *peers.LIBRARIES])
def test_peer_gives_the_reference(name: str, references: dict[str, list[np.ndarray]]) -> None:
    with as_its_authors_run_it():
        try:
            peer = peers.load(name, Settings())
        except ImportError as error:
            pytest.skip(str(error))
        compared = 0
        for case in TINY:
            if not peers.takes_part(name, case) or peer.unsupported(case):
                continue
            program = peer.program(case, make_data(case, "float32"))
            assert program.first_call > 0
            error = largest_error(program.values(), references[case.name])
            if peer.other_equation(case):
                assert error > 1e-3, f"{case.name} agrees after all"
            else:
                assert error < 1e-5, case.name
                compared += 1
    assert compared


def test_the_floor_computes_what_training_computes() -> None:
    case = Case("layer", "GRU", "train", 2, 5, 3, 4)
    program = peers.load(peers.FLOOR, Settings()).program(case, make_data(case, "float32"))
    (cell,) = jax.tree.map(np.asarray, program.args[0])
    w_ih, w_hh, _ = cell["weights"]
    xs, hs, gates = (cell[name].reshape(10, -1) for name in ("xs", "hs", "gates"))
    tanhs = np.tanh(hs[-2:] @ w_hh)
    expected = [
        xs[-1] @ w_ih,
        tanhs,
        tanhs @ w_hh.T,
        xs.T @ gates,
        hs.T @ gates,
    ]
    for value, product in zip(program.values(), expected, strict=True):
        np.testing.assert_allclose(value, product, rtol=1e-4, atol=1e-5)


def test_run_measures_each_peer_and_goes_on_without_what_is_missing(tmp_path: Path) -> None:
    case = Case("layer", "RNN", "forward", 1, 2, 3, 4)
    rows = [Case("devices", "LSTM", mode, 4, 2, 3, 4) for mode in ("forward", "train")]
    odd = Case("devices", "GRU", "train", 3, 2, 3, 4)
    path = tmp_path / "results.json"
    settings = Settings(threads=2)._asdict()
    found: dict[str, Any] = {
        "meta": {"settings": settings, "rounds": 2, "peers": {}},
        "cases": [],
    }
    names = ["seqjax", "flax-linen-devices", "seqjax-devices", "nothing"]
    run.measure([case, *rows, odd], names, found, path)
    assert results.load(path) == found
    answers, *on_devices, without = (entry["peers"] for entry in found["cases"])
    assert set(answers) == {"seqjax", "nothing"}
    for peers_of_rows in on_devices:
        assert set(peers_of_rows) == {"seqjax", "flax-linen-devices", "seqjax-devices"}
        assert all(answer["error"] < 1e-6 for answer in peers_of_rows.values())
    assert without["seqjax-devices"]["missing"] == "batch 3 is not a multiple of 2 devices"
    assert answers["nothing"]["missing"].startswith("not installed: No module named")
    assert len(answers["seqjax"]["seconds"]) == 2
    assert answers["seqjax"]["error"] < 1e-6
    assert answers["seqjax"]["memory"] > 0


def entry(name: str, **peer_answers: dict[str, Any]) -> dict[str, Any]:
    answers = {peer.replace("_", "-"): answer for peer, answer in peer_answers.items()}
    return {"group": "layer", "cell": "LSTM", "mode": "train", "name": name, "peers": answers}


def timed(*seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "seconds": list(seconds),
        "first_call": 1,
        "memory": 8,
        "peak": None,
        "error": 0.0,
    } | more


def hand_made() -> dict[str, Any]:
    return {
        "meta": {
            "command": "command",
            "processor": "processor",
            "settings": Settings()._asdict(),
            "rounds": 3,
            "date": "date",
            "versions": {"jax": "1"},
            "peers": {"seqjax": "1", "keras": "missing: not installed"},
        },
        "cases": [
            entry(
                "first",
                seqjax=timed(1.0, 1.0, 2.0, memory=4),
                torch=timed(2.0, 3.0, 8.0, memory=None),
                flax_linen=timed(2.0, 2.0, 4.0, error="other equation"),
                flax_nnx=timed(1.5, 1.5, 3.0, first_call=0.5),
                keras={"missing": "not installed"},
            ),
            entry("second", seqjax=timed(1.0), torch=timed(0.75), haiku={"failed": "it broke"}),
        ],
    }


def test_ratios() -> None:
    first, second = hand_made()["cases"]
    assert results.time_ratio(first, "torch") == (3.0, 2.5, 3.5)
    assert results.time_ratio(second, "torch") == (0.75, 0.75, 0.75)
    assert results.time_ratio(first, "keras") is None
    assert results.ratio(first, "flax") == 1.5
    assert results.ratio(first, "flax", "first_call") == 0.5
    assert results.ratio(first, "flax-linen", "memory") == 2
    assert results.ratio(first, "torch", "memory") is None
    assert results.ratio(second, "flax") is None
    assert results.ratio(first, "flax-linen", "error") is None
    first["peers"]["floor"] = timed(0.5, 0.5, 1.0)
    assert results.ratio_at_floor(first, "torch") == 6.0
    assert results.ratio_at_floor(second, "torch") is None
    first["peers"]["seqjax-devices"] = timed(0.5, 0.5, 1.0)
    first["peers"]["flax-nnx-devices"] = timed(1.2, 1.2, 2.4)
    assert results.ratio(first, "torch") == 3.0  # One device, but for the group.
    first["group"] = second["group"] = "devices"
    assert results.ratio(first, "torch") == 6.0
    assert results.ratio(first, "flax-linen") == 4.0
    assert results.ratio(first, "flax") == pytest.approx(2.4)
    assert results.ratio(second, "torch") == 0.75
    first["peers"]["seqjax-devices"] = timed(1.5, 1.5, 3.0)
    assert results.ratio(first, "torch") == 3.0


def test_summary_and_targets() -> None:
    found = hand_made()
    measured = results.summary(found["cases"], "torch")
    assert measured is not None
    assert measured.mean == pytest.approx(1.5)
    assert measured[1:] == (0.75, "second", 3.0, "first")
    assert results.summary(found["cases"], "equinox") is None
    for target, holds in [
        (Target("layer", None, None, "torch", 1.4), True),
        (Target("layer", "LSTM", "train", "torch", 1.4, each=True), False),
        (Target("layer", None, None, "torch", 1.6), False),
        (Target("layer", None, None, "torch", 1.6, at_most=True), True),
        (Target("layer", None, None, "torch", 1.6, at_most=True, each=True), False),
    ]:
        assert target.holds(target.summary(found)) == holds
    assert Target("layer", "GRU", None, "torch", 1.0).summary(found) is None
    found["cases"][0]["peers"]["floor"] = timed(0.5, 0.5, 1.0)
    assert Target("layer", "LSTM", None, "torch", 1.0).floor(found) == pytest.approx(6.0)
    assert Target("layer", None, None, "torch", 1.0, measure="memory").floor(found) is None


def test_every_target_has_cases() -> None:
    for target in TARGETS:
        assert [case for case in cases.ALL_CASES if target.covers(vars(case))]


def test_report(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results.save(path, hand_made())
    report.main([str(path)])
    text = (tmp_path / "results.md").read_text()
    assert "| layer | LSTM | train | 2 | 1.50 (0.75) | 1.50 (1.50) |" in text
    assert "|  | torch | 3e+03 | 3.00 [2.50, 3.50] | 0.0e+00 | 1.00 | - | - |" in text
    assert "| other equation |" in text
    assert "* keras missing: not installed (first)" in text
    assert "* haiku failed: it broke (second)" in text
    assert "≥ 1.1 | 1.50 | 0.75 (second) | - | yes |" in text
    assert (tmp_path / "results.png").stat().st_size > 0


def test_readme_table(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmark:begin -->\nold\n<!-- benchmark:end -->\nafter\n")
    for _ in range(2):  # What is written can be rewritten.
        report.write_readme(readme, hand_made())
        text = readme.read_text()
        assert text.startswith("before\n<!-- benchmark:begin -->\n\n| group | cell |")
        assert text.endswith("\n<!-- benchmark:end -->\nafter\n")
        assert "| layer | LSTM | train | 2 | 1.50 (0.75) | 1.50 (1.50) |\n" in text
        assert "keras missing: not installed." in text
        assert "old" not in text
    readme.write_text("no markers")
    with pytest.raises(SystemExit, match="add two lines where the table belongs"):
        report.write_readme(readme, hand_made())


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    run.main(["--list", "--cells", "GRU", "--cases", "decode", "vmap"])
    names = capsys.readouterr().out.split()
    assert names[-1] == "decode-GRU-1x200x64x256-decode"
    assert len(names) == 9
    # Without its variant there is nothing to measure in the group.
    run.main(["--list", "--cells", "GRU", "--cases", "decode", "vmap", "--peers", "torch"])
    assert capsys.readouterr().out.split() == names[-1:]
    run.main(["--list", "--cells", "GRU", "--cases", "decode", "devices", "--device", "gpu"])
    assert capsys.readouterr().out.split() == names[-1:]


def test_unknown_case(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--list", "--cases", "nonsense"])
    assert "no case is in group" in capsys.readouterr().err


def test_resume_keeps_to_the_settings(tmp_path: Path) -> None:
    found = hand_made()
    found["meta"]["settings"]["dtype"] = "bfloat16"
    (tmp_path / "results.json").write_text(json.dumps(found))
    with pytest.raises(SystemExit, match="choose another --out"):
        run.main(["--resume", "--out", str(tmp_path), "--cases", "decode"])
