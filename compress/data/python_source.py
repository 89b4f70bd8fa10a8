"""Real text that every machine has: Python source.

`builtin:python/train` and `builtin:python/val` are the modules of the running interpreter's standard library, without
tests, without site-packages and without the generated `_sysconfigdata` of the machine. A module belongs to `val` when
the first byte of the SHA-256 of its path is below 16 (one module in sixteen), so that the split depends on nothing but
the name. The text differs between Python versions; a report therefore names the version and the hash of the text.

`packages:NAME,NAME` is the Python source of installed packages, by the same rules: a larger training text.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from compress.data.base import Document
from compress.errors import DataError

VAL_BYTES = 16
"""A module is in `val` when the first byte of the hash of its path is below this: 1/16 of the modules."""

SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


def is_validation(path: str) -> bool:
    """Whether the module at `path` (relative, with forward slashes) belongs to the validation split."""
    return hashlib.sha256(path.encode()).digest()[0] < VAL_BYTES


def python_files(root: Path) -> list[Path]:
    """The modules below `root`, sorted by their relative path."""
    found = [
        path
        for path in root.rglob("*.py")
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts) and not path.name.startswith("_sysconfigdata")
    ]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def read_module(path: Path) -> str | None:
    """The source text of a module, or None when its declared encoding does not decode it."""
    try:
        with tokenize.open(path) as stream:
            return stream.read()
    except (SyntaxError, UnicodeDecodeError):
        return None


class StandardLibrary:
    """The standard library's modules of one split."""

    def __init__(self, split: str) -> None:
        if split not in ("train", "val"):
            raise DataError(f"There is no split '{split}' of builtin:python.", remedy="Use 'train' or 'val'.")
        self.spec = f"builtin:python/{split}"
        self.origin = f"standard library of Python {platform.python_version()}"
        self.root = Path(sysconfig.get_paths()["stdlib"])
        self._validation = split == "val"

    def documents(self) -> Iterator[Document]:
        for path in python_files(self.root):
            name = path.relative_to(self.root).as_posix()
            if is_validation(name) == self._validation and (text := read_module(path)):
                yield Document(name, text)


class InstalledPackages:
    """The Python source of installed packages."""

    def __init__(self, names: list[str]) -> None:
        self.spec = "packages:" + ",".join(names)
        self.roots: dict[str, Path] = {}
        versions = []
        for name in names:
            found = importlib.util.find_spec(name)
            if found is None or not found.submodule_search_locations:
                raise DataError(
                    f"The package '{name}' of '{self.spec}' is not installed.",
                    remedy=f"Install it, or leave '{name}' out.",
                )
            self.roots[name] = Path(found.submodule_search_locations[0])
            distributions = importlib.metadata.packages_distributions().get(name, [name])
            try:
                versions.append(f"{name} {importlib.metadata.version(distributions[0])}")
            except importlib.metadata.PackageNotFoundError:
                raise DataError(
                    f"'{name}' of '{self.spec}' is no installed distribution: it has no version to report.",
                    remedy="Name installed packages; the standard library is builtin:python/train.",
                ) from None
        self.origin = ", ".join(versions)

    def documents(self) -> Iterator[Document]:
        for name, root in self.roots.items():
            for path in python_files(root):
                if text := read_module(path):
                    yield Document(f"{name}/{path.relative_to(root).as_posix()}", text)
