"""Where a run puts things: its result, the result of each stage, its work folder. Decided once, here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import UsageError

if TYPE_CHECKING:
    from compress.recipe import QuantizeRecipe, Recipe

INSIDE = {"distill": "distilled", "transform": "transformed", "quantize": "quantized"}
"""Folders inside `out` where they are not called as the stage is."""


@dataclass(frozen=True)
class Places:
    """`stages` has the folder of each stage, None for one whose result is in the report alone."""

    out: Path
    stages: dict[str, Path | None]
    work: Path


def places_of(recipe: Recipe) -> Places:
    """The folders of `recipe`: `out` itself for the result of a single stage, folders inside it for those of several.

    Raises `UsageError` for an `out` that cannot be a folder of the result's own, and for a result that overlaps with
    the work folder or with a model that it is made from: each is replaced as a whole.
    """
    out = _own_folder(recipe.out)
    stages = {name: None if name == "evaluate" else _place(out, name, len(recipe.stages)) for name in recipe.stages}
    work = Path(recipe.work) if recipe.work is not None else out.with_name(f"{out.name}.work")
    sources = (recipe.model, recipe.distill.teacher if recipe.distill is not None else None)
    folders = [("The model", Path(source)) for source in sources if source is not None and Path(source).is_dir()]
    for name, folder in (("The work folder", work), *folders):
        for place in stages.values():
            if place is not None and _overlap(place.resolve(), folder.resolve()):
                raise UsageError(f"{name} '{folder}' and the result '{place}' overlap.", remedy="Name another folder.")
    return Places(out, stages, work)


def table_folder(part: QuantizeRecipe, work: Path) -> Path:
    """Where the table of an allocation is, in a run with the work folder `work`."""
    return Path(part.table) if part.table is not None else work / "table"


def _own_folder(out: str) -> Path:
    """`out` as a path that ends in a name (`q/` is `q`)."""
    whole, here = Path(out).resolve(), Path.cwd().resolve()
    if whole == here or whole in here.parents:
        raise UsageError(
            f"'{out}' cannot be the result: the command runs in this folder, or below it.",
            remedy="Name a folder of its own, such as --out result.",
        )
    if whole.exists() and not whole.is_dir():
        raise UsageError(f"'{out}' exists and is no folder.", remedy="Name another --out.")
    return Path(out) if Path(out).name not in ("", "..") else whole


def _place(out: Path, stage: str, stages: int) -> Path:
    return out if stages == 1 else out / INSIDE.get(stage, stage.partition(":")[2])


def _overlap(one: Path, other: Path) -> bool:
    return one == other or one in other.parents or other in one.parents
