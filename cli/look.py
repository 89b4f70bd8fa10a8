"""The commands that look: eval, inspect, list. They write no file."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from compress.codecs import Codec

from .guard import Guarded
from .options import checked, device_option, json_option, shown, trust_option

verbose_option = click.option("-v", "--verbose", is_flag=True, help="A traceback of errors.")

SHOWN = 8
"""Names of a long list that are printed."""


@click.command("eval", cls=Guarded, short_help="Measure a model on text or images.")
@click.argument("model", metavar="M")
@click.option("--reference", metavar="M", default=None, help="Compare logits with this model's.")
@click.option("--data", metavar="D", multiple=True, required=True, help="Text, several are chained; or images.")
@shown("--context", 256, "Tokens per window of text.", int)
@click.option("--limit", type=int, default=None, help="Tokens, or images, at most.")
@click.option("--activations", type=int, default=None, help="Bits of the matrices' inputs, 2 to 8.  [default: all]")
@click.option("--kv", type=int, default=None, help="Bits of keys and values, 2 to 8.  [default: all]")
@click.option("--kv-group", type=int, default=None, help="Channels with a common scale.  [default: a head]")
@click.option("--plain-keys", is_flag=True, help="Do not mix the channels of keys before they are rounded.")
@device_option
@trust_option
@json_option
@verbose_option
def evaluate(
    model: str,
    reference: str | None,
    data: tuple[str, ...],
    context: int | None,
    limit: int | None,
    activations: int | None,
    kv: int | None,
    kv_group: int | None,
    plain_keys: bool,
    device: str | None,
    trust_remote_code: bool | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Measure model M on text (perplexity, bits per byte) or images (accuracy), and how far it is from a reference. M,
    and never the reference, may have activations, keys and values rounded to few bits while it runs."""
    from compress.recipe import EvaluateRecipe
    from compress.reporting.evaluate import evaluate as measure

    from .quiet import hush_transformers
    from .tables import models_text

    hush_transformers()
    options = {"data": data, "reference": reference, "limit": limit, "context": context}
    options |= {"activations": activations, "kv": kv, "kv_group": kv_group, "mix_keys": False if plain_keys else None}
    asked = checked(EvaluateRecipe, options)
    figures = measure(
        model,
        data=asked.data,
        reference=asked.reference,
        context=asked.context,
        limit=asked.limit,
        activations=asked.activations,
        kv=asked.kv,
        kv_group=asked.kv_group,
        mix_keys=asked.mix_keys,
        device=device or "cpu",
        trust_remote_code=bool(trust_remote_code),
    )
    click.echo(json.dumps(figures, indent=1, ensure_ascii=False) if as_json else models_text({model: figures}))


@click.command(cls=Guarded, short_help="What is in an artifact, matrix by matrix; verifies checksums.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@json_option
@verbose_option
def inspect(folder: Path, as_json: bool, verbose: bool) -> None:
    """What is in an artifact, matrix by matrix. Verifies checksums and reads every payload."""
    from compress.formats.inspect import inspect_artifact
    from compress.ops import backend

    from .tables import figures_text, table

    content = dataclasses.asdict(inspect_artifact(folder))
    matrices = content.pop("rows")
    figures = {**content, "folder": str(folder), "backend": backend()}
    if as_json:
        click.echo(json.dumps({**figures, "matrices": matrices}, indent=1, ensure_ascii=False))
        return
    click.echo(table(list(matrices[0]), [list(matrix.values()) for matrix in matrices]))
    named = figures["ignore"]
    more = f" and {len(named) - SHOWN} more (--json)" if len(named) > SHOWN else ""
    figures["ignore"] = ", ".join(named[:SHOWN]) + more
    if figures["tables"]:
        figures["tables"] = ", ".join(figures["tables"])
    else:
        del figures["tables"]
    click.echo(f"\n{figures_text(figures)}")


def _codecs() -> list[dict[str, Any]]:
    from compress.codecs import codec, codec_names

    listed = []
    for name in codec_names():
        method = codec(name)
        widths = method.widths()
        summary = str(sys.modules[type(method).__module__].__doc__).partition("\n")[0]
        listed.append(
            {
                "name": name,
                "options": dataclasses.asdict(method.config),
                "bits_per_weight": [widths[0] / method.dim, widths[-1] / method.dim],
                "containers": _containers(method),
                "is": " ".join(f"{summary} {method.config_type.__doc__}".split()),
            }
        )
    return listed


def _containers(method: Codec) -> dict[str, list[float]]:
    """The stock containers that carry a codec exactly, each with its least and most bits a weight."""
    found: dict[str, list[float]] = {}
    for width in method.widths():
        for name in method.containers(method.spec(width)):
            least, _ = found.get(name, (width / method.dim, 0.0))
            found[name] = [least, width / method.dim]
    return found


def _first_sentence(text: str) -> str:
    """The first paragraph of a docstring, with the equation that it leads to."""
    found = ""
    for paragraph in text.split("\n\n"):
        found = f"{found} {' '.join(paragraph.split())}".strip()
        if found.endswith("."):
            break
    return found


def _losses() -> list[dict[str, Any]]:
    from compress.losses import loss_class, loss_names, loss_options

    return [
        {
            "name": name,
            "options": loss_options(name),
            "needs": [str(need.name).lower() for need in loss_class(name).needs],
            "is": _first_sentence(str(loss_class(name).__doc__)),
        }
        for name in loss_names()
    ]


def _data() -> list[str]:
    from compress.data.sources import KINDS

    return list(KINDS)


def _models() -> list[str]:
    from compress.modeling.resolve import builtin_names

    return [f"builtin:{name}" for name in builtin_names()]


def _recipes() -> list[str]:
    from compress.recipe import packaged_recipes

    return list(packaged_recipes())


LISTS: Mapping[str, Callable[[], list[Any]]] = {
    "codecs": _codecs,
    "losses": _losses,
    "data": _data,
    "models": _models,
    "recipes": _recipes,
}


@click.command("list", cls=Guarded)
@click.argument("what", type=click.Choice(list(LISTS)))
@json_option
@verbose_option
def list_(what: str, as_json: bool, verbose: bool) -> None:
    """What there is to choose from."""
    from .tables import entry_text

    entries = LISTS[what]()
    click.echo(json.dumps(entries) if as_json else "\n".join(map(entry_text, entries)))
