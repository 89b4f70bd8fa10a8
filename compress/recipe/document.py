"""YAML with the line of every key: what a message about a wrong recipe needs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from compress.errors import RecipeError


class _Loader(yaml.SafeLoader):
    """The safe loader, with the numbers of YAML 1.2: `1e-3` is a number, as everybody expects."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class Document:
    """A parsed YAML text: its plain `value`, and the line of each key."""

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        try:
            loader = _Loader(text)
            self._root = loader.get_single_node()
            self._refuse_duplicates(self._root, set())
            self.value: Any = None if self._root is None else loader.construct_document(self._root)
        except yaml.MarkedYAMLError as error:
            line = f":{error.problem_mark.line + 1}" if error.problem_mark is not None else ""
            raise RecipeError(f"{name}{line}: this is no YAML: {error.problem}.", remedy="Correct the line.") from None
        except yaml.YAMLError as error:
            raise RecipeError(f"{name}: this is no YAML: {error}.", remedy="Correct the file.") from None

    @classmethod
    def read(cls, path: Path) -> Document:
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            raise RecipeError(f"There is no recipe '{path}'.", remedy="Check the path.") from None
        except IsADirectoryError:
            raise RecipeError(f"'{path}' is a folder.", remedy="Name a recipe file.") from None
        except UnicodeDecodeError as error:
            raise RecipeError(f"'{path}' is not UTF-8 text (byte {error.start}).", remedy="Convert it.") from None
        return cls(text, str(path))

    def line(self, location: Sequence[str | int]) -> int | None:
        """The line (from 1) of the key at `location`, or of the nearest part above it that the text has."""
        node, found = self._root, None
        for step in location:
            if isinstance(node, yaml.MappingNode):
                pairs = [(key, value) for key, value in node.value if key.value == str(step)]
                if not pairs:
                    break
                found, node = pairs[0][0].start_mark.line + 1, pairs[0][1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
                node = node.value[step]
                found = node.start_mark.line + 1
            else:
                break
        return found

    def _refuse_duplicates(self, node: yaml.Node | None, seen: set[int]) -> None:
        """Refuse a key given twice, and aliases: a recipe needs none, and a few of them make a text of any size."""
        if node is None:
            return
        if id(node) in seen:
            line = node.start_mark.line + 1
            raise RecipeError(f"{self.name}:{line}: an alias refers to this.", remedy="Write the value out.")
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for entry in node.value:
                self._refuse_duplicates(entry, seen)
        if isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise RecipeError(
                        f"{self.name}:{line}: the key '{key.value}' is already given in line {lines[key.value]}.",
                        remedy="Keep one of the two.",
                    )
                lines[str(key.value)] = line
                self._refuse_duplicates(value, seen)


def parse_scalar(text: str) -> Any:
    """One value as YAML reads it: a number, `true`, `null`, text, or a list or mapping in braces."""
    return Document(text, f"the value '{text}'").value
