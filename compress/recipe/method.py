"""A method by name with its options: a loss, a codec.

Written `NAME[:key=value,...]`, for example `kl:temperature=2,weight=0.5`, or as a mapping with `name` and `options`.
Which names and options exist is known to the registry of each kind of method, not here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from compress.errors import UsageError

Option = bool | int | float | str | None

PATTERN = r"^[A-Za-z_]\w*(:\w+=[^,=]+(,\w+=[^,=]+)*)?$"


SPELLED: Mapping[str, Option] = {"true": True, "false": False, "none": None}


def parse_option(text: str) -> Option:
    """`true` and `false`, `none`, an integer, a number, or else the text itself."""
    if text in SPELLED:
        return SPELLED[text]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


class Method(BaseModel):
    """A name and the options given to it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    options: dict[str, Option] = {}

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if re.match(PATTERN, value) is None:
            raise ValueError("NAME or NAME:key=value,key=value")
        name, _, rest = value.partition(":")
        pairs = [part.split("=") for part in rest.split(",")] if rest else []
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            raise ValueError("each option once")
        return {"name": name, "options": {key: parse_option(text) for key, text in pairs}}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        mapping = handler.resolve_ref_schema(handler(schema))
        return {"anyOf": [{"type": "string", "pattern": PATTERN}, dict(mapping)]}

    def __str__(self) -> str:
        spelled = {value: text for text, value in SPELLED.items()}
        options = ",".join(
            f"{key}={spelled[value] if isinstance(value, bool | None) else value}"
            for key, value in self.options.items()
        )
        return f"{self.name}:{options}" if options else self.name


def parse_method(text: str) -> Method:
    """The method that `text` names. Raises `UsageError` for a text of another form."""
    try:
        return Method.model_validate(text)
    except ValidationError as error:
        raise UsageError(f"'{text}' names no method.", remedy="Write NAME or NAME:key=value,key=value.") from error
