"""Options that several commands share, and the way from options to a recipe.

An option that is not given is not in the recipe, so each default has one home: the recipe's schema. The help repeats
those defaults (`shown`), and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

if TYPE_CHECKING:
    from pydantic import BaseModel

    from compress.recipe import Recipe

Checked = TypeVar("Checked", bound="BaseModel")
Decorated = TypeVar("Decorated", bound=Callable[..., Any])
Decorator = Callable[[Decorated], Decorated]


def stack(*decorators: Callable[[Any], Any]) -> Callable[[Decorated], Decorated]:
    """Several decorators as one, the first on top."""

    def decorate(function: Decorated) -> Decorated:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def shown(name: str, default: object, text: str, kind: Any = None, **more: Any) -> Callable[[Decorated], Decorated]:
    """An option without a value of its own, whose help shows the recipe's default."""
    return click.option(name, type=kind, default=None, show_default=str(default), help=text, **more)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
device_option = shown("--device", "cpu", "Torch device to work on.")
trust_option = click.option(
    "--trust-remote-code", is_flag=True, default=None, help="Let a model bring code of its own, and run it."
)

talk_options = stack(
    click.option("-q", "--quiet", is_flag=True, help="No progress, only warnings and errors."),
    click.option("-v", "--verbose", is_flag=True, help="Every step on a line of its own, and a traceback of errors."),
)

run_options = stack(
    click.option("--work", type=click.Path(), default=None, help="Work folder.  [default: OUT.work]"),
    click.option("--restart", is_flag=True, help="Begin anew; an older result of compress in OUT is replaced."),
    json_option,
    talk_options,
)

seed_option = shown("--seed", 0, "Seed of everything random.", int)

calibration_options = stack(
    click.option(
        "--data",
        metavar="D",
        multiple=True,
        help="Text (several are chained) or images for calibration. None: data-free.",
    ),
    shown("--rows", 128, "Rows of text, or images.", int),
    click.option("--context", type=int, default=None, help="Tokens of a row.  [default: 256, or what the model takes]"),
)

place_options = stack(
    seed_option,
    device_option,
    shown("--max-shard-bytes", 5_000_000_000, "Size at which a new weight file is begun.", int),
    trust_option,
)

transform_options = stack(
    click.argument("model", metavar="M"),
    shown("--transform", "ost", "What is folded: hadamard, or ost, which is learned.", metavar="NAME[:k=v,...]"),
    calibration_options,
    click.option(
        "--bits", type=float, help="Bits per weight to learn for.  [default: none; then activations= or kv= of ost]"
    ),
    shown("--codec", "integer", "How matrices are rounded while it is learned.", metavar="NAME[:k=v,...]"),
    shown("--dtype", "stored", "Of the weights that are written.", click.Choice(["stored", "float32"])),
    place_options,
)

quantize_options = stack(
    click.argument("model", metavar="M"),
    click.option(
        "--bits", type=float, help="Bits per weight, everything stored counted.  [default: the codec's only rate]"
    ),
    click.option("--embedding-bits", type=int, help="Bits of the embedding's integers, 2 to 8.  [default: it stays]"),
    click.option("--head-bits", type=int, help="Bits of the output head's, 2 to 8.  [default: it stays]"),
    shown("--codec", "half_pyramid", "How a matrix becomes bits.", metavar="NAME[:k=v,...]"),
    calibration_options,
    click.option(
        "--rounding",
        metavar="NAME[:k=v,...]",
        default=None,
        help="nearest, or ldlq, which needs data.  [default: what the data allow]",
    ),
    shown(
        "--transform",
        "auto",
        "What is done before rounding: none, hadamard, ost (learned), or auto: hadamard for calibrated half_pyramid "
        "if no head is untied.",
        metavar="NAME[:k=v,...]",
    ),
    click.option(
        "--towers", is_flag=True, help="Quantize what reads images or sound beside a language model too (without data)."
    ),
    shown(
        "--allocation",
        "uniform",
        "How bits are spent: uniform, sensitivity (measured), or evolve (measured, then searched).",
        metavar="NAME[:k=v,...]",
    ),
    click.option("--first-bits", type=float, help="Bits per weight of the first block.  [default: as allocated]"),
    click.option("--last-bits", type=float, help="Bits per weight of the last block.  [default: as allocated]"),
    click.option("--table", type=click.Path(), help="Folder of what is measured, used again.  [default: WORK/table]"),
    shown("--memory", "2GB", "Hidden states kept in memory; the rest on disk.", metavar="SIZE"),
    place_options,
)

distill_options = stack(
    click.option("--student", metavar="M", required=True, help="The model to train."),
    click.option("--teacher", metavar="M", default=None, help="The model to learn from; none: labels alone."),
    click.option("--data", metavar="D", multiple=True, required=True, help="Text; several are chained."),
    click.option(
        "--loss",
        "losses",
        metavar="NAME[:k=v,...]",
        multiple=True,
        required=True,
        help="A loss; several are a weighted sum, for example kl and cross_entropy:weight=0.1.",
    ),
    shown("--steps", 1000, "Optimizer steps.", int),
    shown("--batch-size", 16, "Sequences per forward pass, of all processes.", int),
    shown("--gradient-accumulation", 1, "Forward passes per optimizer step.", int),
    shown("--context", 256, "Tokens per sequence.", int),
    shown("--learning-rate", 0.001, "Peak of the schedule.", float),
    shown(
        "--schedule", "cosine", "Course of the learning rate.", click.Choice(["cosine", "linear", "constant", "wsd"])
    ),
    shown("--warmup-steps", 0, "Steps of linear warm-up.", int),
    shown("--weight-decay", 0.01, "Decay of the matrices.", float),
    shown("--max-grad-norm", 1.0, "Norm to which gradients are clipped; 0 does not clip.", float),
    shown("--optimizer", "adamw", "How to step.", click.Choice(["adamw", "muon"])),
    shown("--precision", "fp32", "Of the forward pass.", click.Choice(["fp32", "bf16"])),
    click.option("--compile", is_flag=True, default=None, help="Compile the student with torch.compile."),
    shown("--parallel", "ddp", "Models on several processes: whole or sharded.", click.Choice(["ddp", "fsdp"])),
    click.option("--fused", is_flag=True, default=None, help="Never hold the logits: for large vocabularies."),
    shown("--save-every", 100, "Steps between checkpoints.", int),
    shown("--log-every", 10, "Steps between log lines.", int),
    click.option("--max-seconds", type=float, default=None, help="End after this time, whatever the steps."),
    seed_option,
    device_option,
    trust_option,
)


def recipe_of(part: Literal["distill", "transform", "quantize"], options: Mapping[str, Any]) -> Recipe:
    """The recipe of one stage from the options that were given. Raises `RecipeError`."""
    from compress.recipe import DistillRecipe, QuantizeRecipe, TransformRecipe, make_recipe

    parts: dict[str, type[Any]] = {"distill": DistillRecipe, "transform": TransformRecipe, "quantize": QuantizeRecipe}
    fields = parts[part].model_fields
    names = {"student": "model"}
    given = {
        names.get(name, name): list(value) if isinstance(value, tuple) else value
        for name, value in options.items()
        if value not in (None, ())
    }
    inner = {name: value for name, value in given.items() if name in fields}
    outer = {name: value for name, value in given.items() if name not in fields}
    return make_recipe({**outer, part: inner})


def checked(part: type[Checked], options: Mapping[str, Any]) -> Checked:
    """A part of a recipe from options that were given, for a command that makes no recipe.

    Raises `UsageError` that names the options, not the keys of a recipe.
    """
    from pydantic import ValidationError

    from compress.errors import UsageError
    from compress.recipe import allowed_text

    given = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    try:
        return part.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        details = error.errors(include_url=False)
    texts = [
        f"--{_option(detail['loc'])} is {detail['input']!r}. Allowed: {allowed_text(detail)}." for detail in details
    ]
    raise UsageError("\n".join(texts))


def _option(location: tuple[int | str, ...]) -> str:
    return str(location[0]).replace("_", "-")
