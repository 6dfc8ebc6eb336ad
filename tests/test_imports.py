"""What imports what, what `import seqjax` loads, what is public, and whether it has an example."""

import ast
import importlib
import importlib.metadata
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import seqjax
import seqjax.interop
import seqjax.linen
import seqjax.nnx

pytestmark = pytest.mark.quick

PACKAGE = Path(seqjax.__file__).parent

RANKS = {
    "initializers": 0,
    "sequences": 0,
    "ops": 0,
    "cells": 1,
    "decoding": 1,
    "layers": 2,
    "recurrence": 3,
    "interop": 4,
    "parameter_names": 4,
    "torch_shape": 4,
    "module_arguments": 5,
    "linen": 6,
    "nnx": 6,
}
"""A part of seqjax (a module or a folder) imports only itself and parts of lower rank."""

MAY_IMPORT_FLAX = {"linen", "nnx"}
MAY_BE_IMPORTED = {"flax", "jax", "numpy", "seqjax", *sys.stdlib_module_names}
"""Everything that seqjax depends on. torch is not among it: tensors come in, and nothing else."""
FOR_TYPE_CHECKERS = {"typing_extensions"}
"""What is only read by type checkers, which bring it along."""

SOURCES = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py"))]
MODULES = [path for path in SOURCES if path != Path("__init__.py")]


def part_of(path: Path) -> str:
    """The part that a source file belongs to: its folder, or its own name."""
    return path.parts[0].removesuffix(".py")


def imported_modules(source: str, package: str) -> Iterator[str]:
    """Full names of what some source imports, at its top or further down."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) + 1 - node.level]
                base = ".".join([*parents, base]).rstrip(".")
            # A name may be a module, or something inside of the module.
            yield from (f"{base}.{alias.name}" for alias in node.names)


class WithoutTypeChecking(ast.NodeTransformer):
    """Leaves of some source what runs."""

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        return node.orelse if ast.unparse(node.test) == "TYPE_CHECKING" else node


def imports_of(path: Path, *, when_run: bool = False) -> set[str]:
    package = ".".join(["seqjax", *path.parts[:-1]])
    source = (PACKAGE / path).read_text()
    if when_run:
        source = ast.unparse(WithoutTypeChecking().visit(ast.parse(source)))
    return set(imported_modules(source, package))


class TestDirections:
    @pytest.mark.parametrize("path", MODULES, ids=str)
    def test_no_import_runs_backward(self, path: Path) -> None:
        part = part_of(path)
        assert part in RANKS, f"{part} is new: give it a rank"
        for name in imports_of(path):
            top, *rest = name.split(".")
            if top != "seqjax":
                continue
            imported = rest[0] if rest else ""
            assert imported in RANKS, f"{path} imports {name}: import the module that has it"
            assert imported == part or RANKS[imported] < RANKS[part], f"{path} imports {name}"

    @pytest.mark.parametrize("path", SOURCES, ids=str)
    def test_nothing_foreign(self, path: Path) -> None:
        allowed = MAY_BE_IMPORTED - (set() if part_of(path) in MAY_IMPORT_FLAX else {"flax"})
        when_run, when_checked = (
            {name.split(".")[0] for name in imports_of(path, when_run=when_run)}
            for when_run in (True, False)
        )
        assert when_run <= allowed
        assert when_checked <= allowed | FOR_TYPE_CHECKERS

    def test_every_rank_is_used(self) -> None:
        assert {part_of(path) for path in MODULES} == RANKS.keys()

    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            ("import seqjax.nnx as n", {"seqjax.nnx"}),
            ("from seqjax import nnx, linen", {"seqjax.nnx", "seqjax.linen"}),
            ("from seqjax.nnx import LSTM", {"seqjax.nnx.LSTM"}),
            ("from . import gru", {"seqjax.cells.gru"}),
            ("from .gru import GRUCell", {"seqjax.cells.gru.GRUCell"}),
            ("from ..layers import Stack", {"seqjax.layers.Stack"}),
            ("def f():\n    import torch", {"torch"}),
        ],
    )
    def test_imports_are_found(self, source: str, expected: set[str]) -> None:
        """The walk itself."""
        assert set(imported_modules(source, "seqjax.cells")) == expected


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
    "seqjax.initializers": "torch_uniform",
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
