"""The help shows what works, and defaults that are those of the recipe."""

from __future__ import annotations

import re

import click
import pytest
from click.testing import CliRunner
from pydantic import BaseModel

from compress.cli.main import main
from compress.recipe import DistillRecipe, EvaluateRecipe, QuantizeRecipe, Recipe


def commands(group: click.Group, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name, command in group.commands.items():
        found.append((*above, name))
        if isinstance(command, click.Group):
            found += commands(command, (*above, name))
    return found


def test_the_commands_of_the_contract_that_work() -> None:
    assert list(main.commands) == [
        "plan",
        "run",
        "distill",
        "transform",
        "quantize",
        "eval",
        "export",
        "inspect",
        "list",
    ]


@pytest.mark.parametrize("words", commands(main), ids=" ".join)
def test_every_command_has_help(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(main, [*words, "--help"])
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage:")
    assert "..." not in re.sub(r"\w\.\.\.\]|=v,\.\.\.|ARGS\]\.\.\.|value \.\.\.", "", result.stdout), (
        "a text that is cut off"
    )


@pytest.mark.parametrize("command", ["distill", "quantize", "eval"])
def test_shown_defaults_are_those_of_the_recipe(command: str) -> None:
    part: type[BaseModel] = {"distill": DistillRecipe, "quantize": QuantizeRecipe, "eval": EvaluateRecipe}[command]
    compared = 0
    for option in main.commands[command].params:
        if not isinstance(option, click.Option) or not isinstance(option.show_default, str):
            continue
        fields = part.model_fields if option.name in part.model_fields else Recipe.model_fields
        assert option.name is not None
        assert option.show_default == str(fields[option.name].default), option.name
        compared += 1
    assert compared >= 2


@pytest.mark.parametrize("command", ["distill", "quantize"])
def test_every_field_of_a_part_has_its_option(command: str) -> None:
    part: type[BaseModel] = {"distill": DistillRecipe, "quantize": QuantizeRecipe}[command]
    options = {option.name for option in main.commands[command].params}
    assert not set(part.model_fields) - options


@pytest.mark.parametrize(("command", "has"), [("distill", True), ("eval", True), ("quantize", True), ("export", False)])
def test_a_device_is_offered_where_it_is_used(command: str, has: bool) -> None:
    assert ("device" in {option.name for option in main.commands[command].params}) == has


def test_version() -> None:
    import compress

    assert CliRunner().invoke(main, ["--version"]).stdout == f"{compress.__version__}\n"
