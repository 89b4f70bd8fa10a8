"""YAML with the line of every key: what a message about a wrong recipe needs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from compress.errors import RecipeError, quoted

LONGEST = 2**18
"""Characters of a recipe at most."""
LONGEST_NUMBER = 400
DEEPEST = 32
PLAIN = "tag:yaml.org,2002:"
PLAIN_TAGS = ("null", "bool", "int", "float", "str", "seq", "map")
NUMBERS = (f"{PLAIN}int", f"{PLAIN}float")


class _Loader(yaml.SafeLoader):
    """The safe loader, with the numbers of YAML 1.2: `1e-3` is a number, as everybody expects. It stops where the
    nesting is deeper than any recipe's: the time that PyYAML takes grows with the cube of the depth."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > DEEPEST:
            raise RecursionError
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


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
            self._check(self._root, set())
            self.value: Any = None if self._root is None else loader.construct_document(self._root)
        except yaml.MarkedYAMLError as error:
            line = f":{error.problem_mark.line + 1}" if error.problem_mark is not None else ""
            raise RecipeError(f"{name}{line}: this is no YAML: {error.problem}.", remedy="Correct the line.") from None
        except yaml.YAMLError as error:
            what = str(error).partition("\n")[0]
            raise RecipeError(f"{name}: this is no YAML: {what}.", remedy="Correct the file.") from None
        except (ValueError, KeyError) as error:  # an explicit tag, such as !!int, before something else
            raise RecipeError(f"{name}: a value is not of its kind: {error}.", remedy="Remove the tag.") from None
        except RecursionError:
            raise RecipeError(f"{name}: it is nested too deeply.", remedy="A recipe has three levels.") from None

    @classmethod
    def read(cls, path: Path) -> Document:
        try:
            with path.open(encoding="utf-8") as stream:
                text = stream.read(LONGEST + 1)
        except (FileNotFoundError, NotADirectoryError):
            raise RecipeError(f"There is no recipe '{path}'.", remedy="Check the path.") from None
        except IsADirectoryError:
            raise RecipeError(f"'{path}' is a folder.", remedy="Name a recipe file.") from None
        except UnicodeDecodeError as error:
            raise RecipeError(f"'{path}' is not UTF-8 text (byte {error.start}).", remedy="Convert it.") from None
        if len(text) > LONGEST:
            raise RecipeError(
                f"'{path}' has more than {LONGEST} characters, and a recipe a few lines.", remedy="Name a recipe file."
            )
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

    def _check(self, node: yaml.Node | None, seen: set[int]) -> None:
        """Refuse what a recipe needs not and what is a trap in one: a key given twice, keys that are no words, aliases
        (a few of them make a text of any size), tags, and values that are not what they look like."""
        if node is None:
            return
        line = node.start_mark.line + 1
        if id(node) in seen:
            raise RecipeError(f"{self.name}:{line}: an alias refers to this.", remedy="Write the value out.")
        seen.add(id(node))
        if not node.tag.startswith(PLAIN) or node.tag.removeprefix(PLAIN) not in PLAIN_TAGS:
            tag = node.tag.removeprefix(PLAIN)
            raise RecipeError(
                f"{self.name}:{line}: this is a value of the kind {quoted(tag)}.",
                remedy="A recipe holds words, numbers, true and false, lists and mappings: put a word into quotes.",
            )
        if isinstance(node, yaml.SequenceNode):
            for entry in node.value:
                self._check(entry, seen)
        if isinstance(node, yaml.MappingNode):
            self._check_mapping(node, seen)
        if isinstance(node, yaml.ScalarNode) and len(node.value) > LONGEST_NUMBER and node.tag in NUMBERS:
            raise RecipeError(f"{self.name}:{line}: this number has {len(node.value)} digits.", remedy="Correct it.")

    def _check_mapping(self, node: yaml.MappingNode, seen: set[int]) -> None:
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"{self.name}:{line}: a key is no word here.", remedy="Correct the line.")
            if key.value in lines:
                raise RecipeError(
                    f"{self.name}:{line}: the key {quoted(key.value)} is already given in line {lines[key.value]}.",
                    remedy="Keep one of the two.",
                )
            lines[key.value] = line
            self._check(value, seen)


def parse_scalar(text: str) -> Any:
    """One value as YAML reads it: a number, `true`, `null`, text, or a list or mapping in braces."""
    return Document(text, f"the value '{text}'").value
