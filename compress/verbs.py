"""`compress.distill`: training a student, as one call that ends with a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.events import Events
from compress.modeling.loading import load_model
from compress.pipeline import run
from compress.recipe import make_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def distill(
    student: str | Path,
    *,
    out: str | Path,
    data: str | Sequence[str],
    teacher: str | Path | None = None,
    losses: Sequence[str] = ("kl",),
    seed: int = 0,
    device: str = "cpu",
    restart: bool = False,
    events: Events | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Train `student` to be like `teacher` on `data`, write it to the folder `out`, and return it loaded.

    `options` are the fields of `distill` in a recipe: steps, batch_size, context, learning_rate and so on. The work
    folder lies beside `out`: the same call takes up where an interrupted one stopped. Raises `RecipeError` for an
    unknown option, and what the training raises. A training loop of your own takes `DistillTrainer` instead.
    """
    part = {"data": data if isinstance(data, str) else list(data), "losses": list(losses), **options}
    if teacher is not None:
        part["teacher"] = str(teacher)
    recipe = make_recipe({"model": str(student), "out": str(out), "seed": seed, "device": device, "distill": part})
    run(recipe, restart=restart, events=events)
    return load_model(out)
