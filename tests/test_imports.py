"""Imports point downwards and in no circle; a verb is never hidden by a module; `--help` costs nothing."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import subprocess
import sys
import time
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import compress

PACKAGE = Path(compress.__file__).parent
CLI = next(path for path in (PACKAGE / "cli", PACKAGE.parent / "cli") if path.is_dir())

LEVELS = (
    {
        "errors",
        "distributed",
        "launch",
        "events",
        "storage",
        "plain_json",
        "hardware",
        "hook",
        "ops",
        "modeling",
        "data",
        "losses",
    },
    {"codecs", "transforms", "evaluation", "workspace", "recipe"},
    {"formats"},
    {"quantization"},
    {"plan", "distillation", "exporters", "integrations", "reporting"},
    {"pipeline"},
    {"verbs"},
    {"cli"},
)
"""From the lowest up. A unit imports from its own level and from those below."""


def _modules() -> dict[str, Path]:
    found = {}
    for root, prefix in ((PACKAGE, "compress"), (CLI, "compress.cli")):
        for path in root.rglob("*.py"):
            name = ".".join([prefix, *path.relative_to(root).with_suffix("").parts]).removesuffix(".__init__")
            found[name] = path
    return found


MODULES = _modules()
UNITS = sorted({name.split(".")[1] for name in MODULES if "." in name})


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _nodes(tree: ast.AST, with_types: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        if with_types or not _is_for_types(child):
            yield child
            yield from _nodes(child, with_types)


def _imports(name: str, with_types: bool = True) -> set[str]:
    """The modules of this package that a module imports, anywhere in it; `with_types` includes those for types only."""
    found = set()
    for node in _nodes(ast.parse(MODULES[name].read_text(encoding="utf-8")), with_types):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*name.split(".")[: -node.level], node.module] if node.level else [node.module]
            module = ".".join(part for part in base if part)
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                found.add(whole if whole in MODULES else module)
    return {module for module in found if module in MODULES and module != "compress"} - {name}


def _level(unit: str) -> int:
    return next(index for index, units in enumerate(LEVELS) if unit in units)


def test_every_unit_has_its_level() -> None:
    assert not set(UNITS) - set().union(*LEVELS), "put the new unit into LEVELS and into docs/architecture.md"


@pytest.mark.parametrize("unit", UNITS)
def test_imports_point_downwards(unit: str) -> None:
    for name in MODULES:
        if name.split(".")[1:2] == [unit]:
            for module in _imports(name):
                other = module.split(".")[1]
                assert _level(other) <= _level(unit), f"{name} imports {module}, which is above it"


def test_units_import_each_other_in_no_circle() -> None:
    graph: dict[str, set[str]] = {unit: set() for unit in UNITS}
    for name in MODULES:
        if name != "compress":
            unit = name.split(".")[1]
            graph[unit] |= {module.split(".")[1] for module in _imports(name)} - {unit}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_modules_import_each_other_in_no_circle() -> None:
    graph = {name: _imports(name, with_types=False) for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("unit", ["codecs", "losses", "ops"])
def test_numerics_know_no_framework(unit: str) -> None:
    allowed = {"torch", "numpy", "compress", *sys.stdlib_module_names}
    for name, path in MODULES.items():
        if name.split(".")[1:2] == [unit]:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
                for module in names:
                    assert module.split(".")[0] in allowed, f"{name} imports {module}"


def test_every_verb_is_callable_after_every_module_was_imported() -> None:
    for name in MODULES:
        if name != "compress.integrations.peft" or importlib.util.find_spec("peft") is not None:
            importlib.import_module(name)
    for verb in compress.__all__:
        value = getattr(compress, verb)
        assert callable(value), f"compress.{verb} is a {type(value).__name__}"
        assert not inspect.ismodule(value)
        assert inspect.getdoc(value), f"compress.{verb} says nothing about itself"


def test_help_is_quick_and_imports_neither_torch_nor_pydantic() -> None:
    code = """
import sys
from compress.cli.main import main
main(["--help"], standalone_mode=False)
heavy = {"torch", "transformers", "numpy", "pydantic", "yaml", "safetensors"} & set(sys.modules)
assert not heavy, heavy
"""
    seconds: dict[str, list[float]] = {code: [], "import click": []}
    for each in [*seconds] * 5:
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", each], capture_output=True, text=True, check=False)
        seconds[each].append(time.perf_counter() - started)
        assert done.returncode == 0, done.stderr
        assert ("quantize" in done.stdout) == (each == code)
    assert min(seconds[code]) < 4 * min(seconds["import click"])


def test_importing_the_package_imports_no_torch() -> None:
    code = (
        "import sys, compress; dir(compress); assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
