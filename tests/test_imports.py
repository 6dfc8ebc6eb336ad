"""What imports what, what `import seqjax` loads, what is public, and whether it has an example."""

import ast
import importlib
import importlib.metadata
import inspect
import subprocess
import sys
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import grimp
import pytest

import seqjax
import seqjax.interop
import seqjax.linen
import seqjax.nnx

pytestmark = pytest.mark.quick

PACKAGE = Path(seqjax.__file__).parent
SOURCES = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py"))]

RANKS = {
    "initializers": 0,
    "output_and_state": 0,
    "sequences": 0,
    "ops": 0,
    "cells": 1,
    "decoding_arguments": 1,
    "decoding": 2,
    "layers": 2,
    "recurrence": 3,
    "interop": 4,
    "parameter_names": 4,
    "torch_shape": 4,
    "initial_parameters": 5,
    "module_arguments": 6,
    "linen": 7,
    "nnx": 7,
    "": 8,
}
"""A part of seqjax (a module or a folder) imports only itself and parts of lower rank.

The package itself, "", hands on what is public: no part imports it.
"""

MAY_IMPORT_FLAX = {"linen", "nnx"}
MAY_BE_IMPORTED = {"jax", "numpy", *sys.stdlib_module_names}
"""Everything that seqjax depends on. torch is not among it: tensors come in, and nothing else."""
FOR_TYPE_CHECKERS = {"typing_extensions"}
"""What is only read by type checkers, which bring it along."""


def read_imports(*, when_run: bool) -> grimp.ImportGraph:
    """All imports of the sources, at their top or further down; also those for type checkers."""
    return grimp.build_graph(
        "seqjax",
        include_external_packages=True,
        exclude_type_checking_imports=when_run,
        cache_dir=None,
    )


def part_of(module: str) -> str:
    """The part that a module belongs to."""
    return module.split(".")[1] if "." in module else ""


def imports(graph: grimp.ImportGraph) -> Iterator[tuple[str, str]]:
    """Who imports what."""
    for module in sorted({"seqjax"} | graph.find_descendants("seqjax")):
        for imported in sorted(graph.find_modules_directly_imported_by(module)):
            yield module, imported


def backward(graph: grimp.ImportGraph) -> list[tuple[str, str]]:
    return [
        (module, imported)
        for module, imported in imports(graph)
        if imported.split(".")[0] == "seqjax"
        and (part := part_of(module)) != (other := part_of(imported))
        and RANKS[part] <= RANKS[other]
    ]


def foreign(graph: grimp.ImportGraph, allowed: Set[str]) -> list[tuple[str, str]]:
    return [
        (module, imported)
        for module, imported in imports(graph)
        if imported.split(".")[0] not in allowed | {"seqjax"}
        and not (imported == "flax" and part_of(module) in MAY_IMPORT_FLAX)
    ]


class TestDirections:
    def test_every_source_is_read_and_ranked(self) -> None:
        modules = {"seqjax"} | read_imports(when_run=False).find_descendants("seqjax")
        assert len(modules) == len(SOURCES)
        assert {part_of(module) for module in modules} == RANKS.keys()

    def test_no_import_runs_backward(self) -> None:
        assert backward(read_imports(when_run=False)) == []

    def test_nothing_foreign(self) -> None:
        assert foreign(read_imports(when_run=True), MAY_BE_IMPORTED) == []
        allowed = MAY_BE_IMPORTED | FOR_TYPE_CHECKERS
        assert foreign(read_imports(when_run=False), allowed) == []

    @pytest.mark.parametrize(
        "wrong",
        [
            ("seqjax.ops.masking", "seqjax.cells.base"),
            ("seqjax.cells.gru", "seqjax"),
            ("seqjax.nnx", "seqjax.linen"),
            ("seqjax", "torch"),
            ("seqjax.interop.torch", "torch"),
            ("seqjax.layers", "flax"),
        ],
    )
    def test_a_wrong_import_is_noticed(self, wrong: tuple[str, str]) -> None:
        """The rules themselves."""
        graph = read_imports(when_run=True)
        graph.add_import(importer=wrong[0], imported=wrong[1])
        assert backward(graph) + foreign(graph, MAY_BE_IMPORTED) == [wrong]

    def test_the_drawing_is_up_to_date(self) -> None:
        check = [sys.executable, "-m", "docs.structure", "--check"]
        run = subprocess.run(check, cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after a statement."""
    program = f"{statement}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True
    )
    return set(run.stdout.split())


class TestLoading:
    def test_core_loads_no_flax(self) -> None:
        loaded = loaded_by("import seqjax, seqjax.interop")
        assert "jax" in loaded
        assert not loaded & {"flax", "torch", "optax", "chex", "keras", "hypothesis", "pytest"}

    def test_shells_load_no_torch(self) -> None:
        loaded = loaded_by("import seqjax.nnx, seqjax.linen")
        assert "flax" in loaded
        assert not loaded & {"torch", "keras", "hypothesis", "pytest"}


PUBLIC_MODULES = [
    "seqjax",
    "seqjax.cells",
    "seqjax.decoding",
    "seqjax.initializers",
    "seqjax.interop",
    "seqjax.interop.torch",
    "seqjax.layers",
    "seqjax.linen",
    "seqjax.nnx",
    "seqjax.recurrence",
    "seqjax.sequences",
]
PUBLIC_NAMES = {
    "seqjax": "RNNCell LSTMCell GRUCell GatedCell Cell Layer Stack Bidirectional scan generate "
    "beam_search lengths_to_mask mask_to_lengths pad_sequence unpad_sequence RNNParams LSTMParams "
    "GRUParams GatedParams BidirectionalParams LSTMCarry BidirectionalCarry Generation Beams "
    "initializers interop",
    "seqjax.nnx": "RNN LSTM GRU RNNCell LSTMCell GRUCell Recurrent",
    "seqjax.linen": "RNN LSTM GRU RNNCell LSTMCell GRUCell Recurrent "
    "from_torch torch_state_dict load_torch_state_dict",
    "seqjax.interop": "params_from_torch params_to_torch",
    "seqjax.initializers": "torch_uniform orthogonal forget_bias",
}
"""Every name of the modules that users import: what is public is decided here, too."""

PUBLIC_VALUES = [
    pytest.param(getattr(importlib.import_module(module), name), id=f"{module}.{name}")
    for module, names in PUBLIC_NAMES.items()
    for name in names.split()
]


class TestPublicNames:
    @pytest.mark.parametrize("module", PUBLIC_MODULES)
    def test_nothing_else_is_shown(self, module: str) -> None:
        loaded = importlib.import_module(module)
        assert dir(loaded) == sorted(loaded.__all__)

    @pytest.mark.parametrize("module", PUBLIC_MODULES)
    def test_star_gives_them(self, module: str) -> None:
        given: dict[str, Any] = {}
        exec(f"from {module} import *", given)
        assert given.keys() - {"__builtins__"} == {*importlib.import_module(module).__all__}
        assert all(value.__doc__ for name, value in given.items() if name != "__builtins__")

    @pytest.mark.parametrize("module", PUBLIC_NAMES)
    def test_they_are_the_expected(self, module: str) -> None:
        assert dir(importlib.import_module(module)) == sorted(PUBLIC_NAMES[module].split())

    def test_version_is_that_of_the_installed_package(self) -> None:
        assert seqjax.__version__ == importlib.metadata.version("seqjax")


class TestDocumentation:
    @pytest.mark.parametrize("value", PUBLIC_VALUES)
    def test_public_name_has_an_example(self, value: Any) -> None:
        documentation = inspect.getdoc(value) or ""
        assert value.__doc__, "no docstring"
        # NamedTuples are seen in their layers' examples, modules in their functions'.
        if not (hasattr(value, "_fields") or inspect.ismodule(value)):
            assert ">>> " in documentation

    @pytest.mark.parametrize("path", SOURCES, ids=str)
    def test_module_has_a_docstring(self, path: Path) -> None:
        assert ast.get_docstring(ast.parse((PACKAGE / path).read_text()))
