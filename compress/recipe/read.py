"""From text to a `Recipe`, with messages that name file, line, key, and what is allowed there."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from compress.errors import RecipeError, nearest, quoted
from compress.recipe.document import Document, parse_scalar
from compress.recipe.schema import Recipe

Location = tuple[str | int, ...]
MOST_NAMED = 4


def packaged_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name (their path below `recipes/` without `.yaml`)."""
    package = Path(__file__).parents[1]
    folder = next((f for f in (package / "recipes", package.parent / "recipes") if f.is_dir()), None)
    if folder is None:
        return {}
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def load_recipe(reference: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, or the packaged one of that name, with `a.b=value` overrides. Raises `RecipeError`.

    The config of a student in the file is relative to the file's folder; one that an override names, like all other
    paths, to the folder that the command runs in.
    """
    path, known = Path(reference), packaged_recipes()
    if not path.is_file() and reference in known:
        path = known[reference]
    if not path.exists():
        remedy = nearest(reference, known, "Name a file, or one that comes with the package")
        raise RecipeError(f"There is no recipe '{reference}'.", remedy=remedy)
    document = Document.read(path)
    if not isinstance(document.value, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys.", remedy="Begin with `model:` and `out:`.")
    value = _beside(path.parent, document.value)
    return make_recipe(with_overrides(value, overrides), document, overrides)


def _beside(folder: Path, value: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a recipe's data whose student config, if it has one, is a path that starts from `folder`."""
    result: dict[str, Any] = _copy(dict(value))
    distill = result.get("distill")
    student = distill.get("student") if isinstance(distill, dict) else None
    if isinstance(student, dict) and isinstance(student.get("config"), str):
        student["config"] = str(folder / student["config"])
    return result


def with_overrides(value: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of nested mappings with each `a.b=value` set; the value is read as YAML, list entries count from 0."""
    result: dict[str, Any] = _copy(dict(value))
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not all(path.split(".")):
            raise RecipeError(f"--set {override} sets nothing.", remedy="Write --set key.key=value.")
        *parents, last = path.split(".")
        target = result
        for key in parents:
            target = _enter(target, key, override)
        _assign(target, last, parse_scalar(text), override)
    return result


def make_recipe(value: Mapping[str, Any], document: Document | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Validate plain data. `document` and `overrides` say where it came from, for the message of a `RecipeError`."""
    try:
        return Recipe.model_validate(dict(value))
    except ValidationError as error:
        settings = {override.partition("=")[0]: override for override in overrides}
        texts = [_explain(detail, document, settings) for detail in _distinct(error.errors(include_url=False))]
    raise RecipeError("\n".join(texts))


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(entry) for key, entry in value.items()}
    return [_copy(entry) for entry in value] if isinstance(value, list) else value


def _index(target: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(target):
        raise RecipeError(f"--set {override}: there is no entry '{key}' in a list of {len(target)}.")
    return int(key)


def _enter(target: Any, key: str, override: str) -> Any:
    if isinstance(target, list):
        return target[_index(target, key, override)]
    if not isinstance(target, dict):
        raise RecipeError(f"--set {override}: there is nothing below '{target}' to set.", remedy="Set the key above.")
    if target.get(key) is None:
        target[key] = {}
    return target[key]


def _assign(target: Any, key: str, value: Any, override: str) -> None:
    if isinstance(target, list):
        target[_index(target, key, override)] = value
    elif isinstance(target, dict):
        target[key] = value
    else:
        raise RecipeError(f"--set {override}: there is nothing below '{target}' to set.", remedy="Set the key above.")


def _distinct(errors: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """The first error of each place: a union reports one for each of its types."""
    found: dict[Location, ErrorDetails] = {}
    for error in errors:
        found.setdefault(_known_location(error), error)
    return list(found.values())


def _known_location(error: ErrorDetails) -> Location:
    """The place of an error without the names of union members, which pydantic appends."""
    location: list[str | int] = []
    model: type[BaseModel] | None = Recipe
    for position, step in enumerate(error["loc"]):
        last = position == len(error["loc"]) - 1
        if isinstance(step, str) and (model is None or step not in model.model_fields):
            if not (last and error["type"] == "extra_forbidden"):
                break
            model = None
        elif isinstance(step, str) and model is not None:
            model = _part(model.model_fields[step].annotation)
        location.append(step)
    return tuple(location)


def _part(annotation: Any) -> type[BaseModel] | None:
    """The recipe part inside an annotation such as `list[Part]` or `Part | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    parts = (_part(argument) for argument in typing.get_args(annotation))
    return next((part for part in parts if part is not None), None)


def _model_at(location: Location) -> type[BaseModel]:
    model: type[BaseModel] = Recipe
    for step in location:
        if isinstance(step, str):
            model = _part(model.model_fields[step].annotation) or model
    return model


def _explain(error: ErrorDetails, document: Document | None, settings: Mapping[str, str]) -> str:
    location = _known_location(error)
    name = ".".join(str(step) for step in location)
    where = _where(location, name, document, settings)
    if error["type"] == "extra_forbidden":
        remedy = nearest(str(location[-1]), _model_at(location[:-1]).model_fields, "Known here")
        return f"{where}unknown key '{name}'. {remedy}"
    if error["type"] == "missing":
        return f"{where}the key '{name}' is missing."
    allowed = allowed_text(error)
    if not name:
        return f"{where}{allowed}."
    if error["type"] == "value_error" and isinstance(error["input"], Mapping):
        return f"{where}'{name}': {allowed}."
    return f"{where}'{name}' is {_spelled(error['input'])}. Allowed: {allowed}."


def _spelled(value: Any) -> str:
    """A value as a message shows it: a part of a recipe by its kind, anything else as it was written."""
    if isinstance(value, Mapping):
        return f"a mapping of {', '.join(map(str, list(value)[:MOST_NAMED])) or 'nothing'}"
    if isinstance(value, list) and any(isinstance(entry, (Mapping, list)) for entry in value):
        return f"a list of {len(value)}"
    return "empty" if value is None else quoted(value)


def allowed_text(error: ErrorDetails) -> str:
    """What would have been right, in the words of pydantic's message."""
    if error["type"] in ("model_type", "dict_type"):
        return "a mapping of keys"
    text = error["msg"]
    for prefix in ("Value error, ", "Input should be ", "String should have "):
        text = text.removeprefix(prefix)
    return text


def _where(location: Location, name: str, document: Document | None, settings: Mapping[str, str]) -> str:
    for path, override in settings.items():
        if name == path or name.startswith(f"{path}."):
            return f"--set {override}: "
    if document is None:
        return ""
    line = document.line(location)
    return f"{document.name}:{line}: " if line is not None else f"{document.name}: "
