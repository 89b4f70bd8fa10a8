"""The commands that work: run, distill, transform, quantize, export. Each makes a recipe and carries it out."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from .guard import Guarded
from .options import (
    distill_options,
    quantize_options,
    recipe_of,
    run_options,
    transform_options,
    trust_option,
)

if TYPE_CHECKING:
    from compress.recipe import Recipe

out_option = click.option("--out", type=click.Path(), required=True, help="Folder of the result.")


def carry_out(recipe: Recipe, *, restart: bool, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Run `recipe` with progress on stderr, and print the report on stdout."""
    from compress.events import Events, TerminalProgress
    from compress.launch import launch
    from compress.pipeline import run as run_recipe

    from .quiet import hush_transformers
    from .tables import report_text

    hush_transformers()
    first = launch().rank == 0
    progress = TerminalProgress(sys.stderr, quiet, verbose)
    try:
        report = run_recipe(recipe, restart=restart, events=Events([progress]))
    finally:
        progress.close()
    if not first:
        return
    if as_json:
        click.echo(json.dumps(report, indent=1, ensure_ascii=False))
    elif not quiet:
        click.echo(report_text(report))


@click.command(cls=Guarded, short_help="Carry out a recipe.")
@click.argument("recipe")
@click.option("--set", "overrides", metavar="a.b=value", multiple=True, help="Change a value of the recipe.")
@run_options
def run(recipe: str, overrides: tuple[str, ...], work: str | None, **how: Any) -> None:
    """Carry out a recipe: a YAML file, or one of `compress list recipes`."""
    from compress.recipe import load_recipe

    place = [] if work is None else [f"work={json.dumps(work)}"]
    carry_out(load_recipe(recipe, [*overrides, *place]), **how)


@click.command(cls=Guarded)
@distill_options
@out_option
@run_options
def distill(restart: bool, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
    """Train a student to be like a teacher."""
    recipe = recipe_of("distill", options)
    carry_out(recipe, restart=restart, as_json=as_json, quiet=quiet, verbose=verbose)


@click.command(cls=Guarded, short_help="Fold a change of basis into a model's weights.")
@transform_options
@out_option
@run_options
def transform(restart: bool, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
    """Write model M in another basis, easier to quantize: the same function, an ordinary checkpoint for any tool."""
    recipe = recipe_of("transform", options)
    carry_out(recipe, restart=restart, as_json=as_json, quiet=quiet, verbose=verbose)


@click.command(cls=Guarded, short_help="Give a model few bits a weight.")
@quantize_options
@out_option
@run_options
def quantize(restart: bool, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
    """Give the linear maps of model M few bits. The result loads with transformers after `import compress`."""
    recipe = recipe_of("quantize", options)
    carry_out(recipe, restart=restart, as_json=as_json, quiet=quiet, verbose=verbose)


@click.command(cls=Guarded, short_help="Write a model in another format.")
@click.argument("folder", metavar="DIR")
@click.option("--to", type=click.Choice(["onnx", "bitsandbytes"]), required=True, help="Format.")
@trust_option
@out_option
@run_options
def export(folder: str, to: str, restart: bool, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
    """Write the model in DIR in another format, and check it against the original."""
    from compress.recipe import make_recipe

    given = {name: value for name, value in options.items() if value is not None}
    recipe = make_recipe({**given, "model": folder, "export": [{"to": to}]})
    carry_out(recipe, restart=restart, as_json=as_json, quiet=quiet, verbose=verbose)
