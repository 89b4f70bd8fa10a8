"""`compress plan`: what would be done, for a recipe or for the options of another command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .guard import Guarded
from .options import distill_options, json_option, quantize_options, recipe_of, stack, transform_options

if TYPE_CHECKING:
    from compress.recipe import Recipe

look_options = stack(json_option, click.option("-v", "--verbose", is_flag=True, help="A traceback of errors."))
out_option = click.option(
    "--out", type=click.Path(), default="result", show_default=True, help="Folder that the result would have."
)

UNPLANNED = ("eval", "export", "inspect", "list")
"""Words that a person may try here: commands that run no stages worth a plan."""


class PlanGroup(click.Group):
    """Takes `quantize ...` and `distill ...` as their commands do; options of theirs without the word; or a recipe."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args[:1] == ["run"]:
            args = ["recipe", *args[1:]]
        elif args and args[0] in UNPLANNED and not Path(args[0]).exists():
            raise click.UsageError(
                f"`compress {args[0]}` has no plan. `compress plan` takes a recipe, quantize, transform or distill.",
                ctx,
            )
        elif args and args[0] not in ("-h", "--help") and args[0] not in self.commands:
            args = [self._meant(args), *args]
        return super().parse_args(ctx, args)

    def _meant(self, args: list[str]) -> str:
        names = {argument.partition("=")[0] for argument in args}
        if names & {"--bits", "--codec", "--sweep"}:
            return "quantize"
        return "distill" if "--student" in names else "recipe"


@click.group(cls=PlanGroup, short_help="Print what would be done; run nothing.")
def plan() -> None:
    """Print what would be done: stages, matrices, bits, bytes, memory. Run nothing.

    \b
    compress plan [run] RECIPE [--set a.b=value ...] [--json]
    compress plan quantize M --bits 3.25 [the options of compress quantize] [--json]
    compress plan quantize M --sweep 2:4.5:0.25 --allocation sensitivity --data D [the same options] [--json]
    compress plan transform M --data D [the options of compress transform] [--json]
    compress plan distill --teacher M --student M [the options of compress distill] [--json]

    The words quantize and distill may be left out when their options are there.
    """


def _show(recipe: Recipe, as_json: bool) -> None:
    from compress.plan import make_plan

    from .tables import plan_text

    made = make_plan(recipe)
    click.echo(json.dumps(made.to_dict(), indent=1, ensure_ascii=False) if as_json else plan_text(made))


@plan.command("recipe", cls=Guarded, hidden=True)
@click.argument("recipe")
@click.option("--set", "overrides", metavar="a.b=value", multiple=True, help="Change a value of the recipe.")
@look_options
def plan_recipe(recipe: str, overrides: tuple[str, ...], as_json: bool, verbose: bool) -> None:
    """Plan a recipe: a YAML file, or one of `compress list recipes`."""
    from compress.recipe import load_recipe

    _show(load_recipe(recipe, overrides), as_json)


@plan.command("quantize", cls=Guarded, short_help="Plan a quantization.")
@quantize_options
@out_option
@click.option("--work", type=click.Path(), default=None, help="Work folder.  [default: OUT.work]")
@click.option(
    "--sweep", metavar="FIRST:LAST:STEP", help="Several rates by the table of an allocation: bytes and predicted loss."
)
@look_options
def plan_quantize(as_json: bool, verbose: bool, sweep: str | None, **options: Any) -> None:
    """Plan a quantization: every matrix with its bits, and the size of the result."""
    recipe = recipe_of("quantize", options)
    if sweep is None:
        _show(recipe, as_json)
        return
    from compress.plan.sweep import parse_rates
    from compress.plan.sweep import sweep as sweep_rates

    from .tables import sweep_text

    made = sweep_rates(recipe, parse_rates(sweep))
    click.echo(json.dumps(made.to_dict(), indent=1, ensure_ascii=False) if as_json else sweep_text(made))


@plan.command("transform", cls=Guarded, short_help="Plan a transform.")
@transform_options
@out_option
@look_options
def plan_transform(as_json: bool, verbose: bool, **options: Any) -> None:
    """Plan a transform: what is learned, what cannot be folded, memory."""
    _show(recipe_of("transform", options), as_json)


@plan.command("distill", cls=Guarded, short_help="Plan a distillation.")
@distill_options
@out_option
@look_options
def plan_distill(as_json: bool, verbose: bool, **options: Any) -> None:
    """Plan a distillation: steps, tokens, memory."""
    _show(recipe_of("distill", options), as_json)
