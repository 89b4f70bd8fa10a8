"""What the names in a recipe stand for today: what a run must have in common with the one that it takes up.

A model's name stays while its files change, and so does that of a data file; another version of torch or of this
package, or the other backend, may round differently. A work folder keeps all of it as arguments of the run.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

import compress
from compress.data import data_source, fingerprint
from compress.modeling.resolve import HUB_FILES, resolve_model
from compress.ops import backend
from compress.quantization.allocation import Uniform, allocation_of
from compress.recipe.schema import Recipe, flatten
from compress.storage import file_sha256

if TYPE_CHECKING:
    from compress.plan.plan import Plan

HASHED_BYTES = 64_000_000
"""Up to this size a file is known by its content (a quarter of a second), above by its size and time of change."""
OF_TABLES = ("codec", "rounding", "transform", "data", "rows", "context", "towers")
"""The fields of a quantization that decide what is measured for an allocation."""
FILES = (*HUB_FILES, "*.py")
"""What of a model's folder decides what the model does: weights, configs, tokenizer, and code that came with it."""


def arguments(plan: Plan) -> dict[str, Any]:
    """Every value that decides the result, by a name that a person understands."""
    recipe = plan.recipe
    student = recipe.distill.student if recipe.distill is not None else None
    models = [*recipe.models, *([student.tokenizer] if student is not None and student.tokenizer is not None else [])]
    made = {stage.out for stage in plan.stages}
    values = {**recipe.arguments(), "out": plan.out, "backend": plan.backend}
    values |= _versions()
    values |= {f"files of {model}": model_stamp(model) for model in models if str(Path(model)) not in made}
    values |= {f"hash of {data['spec']}": data.get("sha256", data["origin"]) for data in plan.data}
    if student is not None:
        values["distill.student.config"] = f"sha256 {file_sha256(Path(student.config))[:16]}"
    return values


def table_arguments(recipe: Recipe, model: str) -> dict[str, Any]:
    """Of those, what a table of the losses of `model` depends on, which is what `recipe` quantizes: everything but the
    rates, and what becomes of the result."""
    part = recipe.quantize
    assert part is not None
    asked = part.model_dump(mode="json", include=set(OF_TABLES))
    rows = allocation_of(part.allocation.name, part.allocation.options)
    values = {**flatten(asked), "seed": recipe.seed, "backend": backend(), "model": model}
    if not isinstance(rows, Uniform):
        values["allocation.rows"] = rows.rows
    if part.transform.name == "ost":  # which is learned for matrices of that rate
        values |= {"bits": part.bits, "first_bits": part.first_bits, "last_bits": part.last_bits}
    values |= _versions()
    values[f"files of {model}"] = model_stamp(model)
    return values | {f"hash of {spec}": data_stamp(spec) for spec in part.data or ()}


def _versions() -> dict[str, str]:
    return {"compress": compress.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def data_stamp(spec: str) -> str:
    """A hash over the documents or images of a source; of installed packages, which are large, only their versions."""
    source = data_source(spec)
    return source.origin if spec.startswith("packages:") else fingerprint(source).sha256


def model_stamp(reference: str) -> str:
    """A short hash over the files of model `reference`."""
    folder = resolve_model(reference)
    paths = sorted({path for pattern in FILES for path in folder.glob(pattern) if path.is_file()})
    return hashlib.sha256(repr([_facts(path) for path in paths]).encode()).hexdigest()[:16]


def _facts(path: Path) -> tuple[str | int, ...]:
    status = path.stat()
    if status.st_size <= HASHED_BYTES:
        return (path.name, file_sha256(path))
    return (path.name, status.st_size, status.st_mtime_ns)
