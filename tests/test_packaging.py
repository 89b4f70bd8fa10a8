"""The wheel: what is in it, that it works far from the checkout, and that it can be built without a compiler.

The sources that a build needs are copied first, so that nothing of the checkout (an older build, a `.git`) takes part.
`outside` then runs the installed package in a process that cannot see the checkout even when that is installed in
editable mode: with `python -S` no `.pth` file is read, so the hook of the editable installation is never put in place,
and the dependencies come from `PYTHONPATH`, behind the folder that the wheel was installed into.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "compress", "cli", "cuda", "recipes", "models")
PLAN = ("plan", "quantize", "builtin:student", "--bits", "3.25")


def call(*words: str | Path, cwd: Path, **environment: str) -> str:
    """The standard output of a command that must succeed."""
    done = subprocess.run(words, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(folder: Path, **environment: str) -> Path:
    """The wheel of a copy of the checkout's sources."""
    sources = folder / "sources"
    leave_out = shutil.ignore_patterns("__pycache__", "_native*")
    for name in SOURCES:
        if (CHECKOUT / name).is_dir():
            shutil.copytree(CHECKOUT / name, sources / name, ignore=leave_out)
        else:
            sources.mkdir(exist_ok=True)
            shutil.copy(CHECKOUT / name, sources / name)
    call(sys.executable, "-m", "build", "--wheel", "--outdir", folder, sources, cwd=folder, **environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """The wheel, installed into a folder of its own, the dependencies left out."""
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    call(*pip, "--no-deps", "--no-index", "--target", folder, wheel, cwd=wheel.parent)
    return folder


def outside(installed: Path, *words: str | Path, cwd: Path) -> str:
    """The output of `python -S ...` with what is installed in `installed`, and no sight of the checkout."""
    packages = dict.fromkeys(sysconfig.get_paths()[name] for name in ("purelib", "platlib"))
    path = os.pathsep.join([str(installed), *packages])
    return call(sys.executable, "-S", *words, cwd=cwd, PYTHONPATH=path)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("needs a C++ compiler")
    return build(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def installed(wheel: Path) -> Path:
    return install(wheel, wheel.parent / "installed")


@pytest.fixture(scope="session")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a machine whose compilers all fail."""
    folder = tmp_path_factory.mktemp("pure")
    broken = folder / "compiler"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    return build(folder, CC=str(broken), CXX=str(broken))


def members(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def modules(folder: Path, inside: str) -> set[str]:
    """The Python files of a folder of the checkout, by their names in a wheel that has it at `inside`."""
    return {f"{inside}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py")}


def test_the_wheel_holds_the_package_and_its_data(wheel: Path) -> None:
    names = members(wheel)
    wanted = modules(CHECKOUT / "compress", "compress") | modules(CHECKOUT / "cli", "compress/cli")
    assert wanted <= names
    assert {
        "compress/py.typed",
        "compress/codecs/pyramid/levels.json",
        "compress/cuda/host.cpp",
        "compress/cuda/encode.cuh",
        "compress/recipes/demo.yaml",
    } <= names
    for model in ("teacher", "student"):
        assert {
            f"compress/models/{model}/{file}" for file in ("config.json", "model.safetensors", "tokenizer.json")
        } <= names
    assert [name for name in names if name.startswith("compress/_native.")]
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]


def test_the_wheel_holds_nothing_else(wheel: Path) -> None:
    for name in members(wheel):
        top, *rest = Path(name).parts
        assert top == "compress" or top.endswith(".dist-info"), name
        assert not {"tests", "benchmarks", "docs", "__pycache__"} & set(rest), name
    assert "compress/models/build.py" not in members(wheel)
    assert "-py3-none-" in wheel.name, "the library knows no Python, so the wheel is not bound to one version"


def test_the_installed_package_works_far_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    place = outside(installed, "-c", "import compress; print(compress.__file__)", cwd=tmp_path)
    assert Path(place.strip()).is_relative_to(installed)
    script = installed / "bin" / "compress"
    assert "quantize" in outside(installed, script, "--help", cwd=tmp_path)
    assert outside(installed, script, "list", "models", cwd=tmp_path).split() == ["builtin:student", "builtin:teacher"]
    assert "demo" in outside(installed, script, "list", "recipes", cwd=tmp_path).split()
    plan = outside(installed, script, *PLAN, cwd=tmp_path).split()
    assert plan[plan.index("backend") + 1] == "native"
    assert not list(tmp_path.iterdir())


def test_without_a_compiler_the_package_installs_and_says_so(pure_wheel: Path, tmp_path: Path) -> None:
    assert not [name for name in members(pure_wheel) if "_native" in name]
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    pure = install(pure_wheel, tmp_path / "pure")
    place = tmp_path / "elsewhere"
    place.mkdir()
    plan = outside(pure, pure / "bin" / "compress", *PLAN, cwd=place).split()
    assert plan[plan.index("backend") + 1] == "reference"
