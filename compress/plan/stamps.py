"""What the names in a recipe stand for today: what a run must have in common with the one that it takes up.

A model's name stays while its files change, and so does that of a data file; another version of torch or of this
package, or the other backend, may round differently. A work folder keeps all of it as arguments of the run.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import transformers

import compress
from compress.modeling.resolve import HUB_FILES, resolve_model
from compress.plan.plan import Plan
from compress.storage import file_sha256

HASHED_BYTES = 64_000_000
"""Up to this size a file is known by its content (a quarter of a second), above by its size and time of change."""
FILES = (*HUB_FILES, "*.py")
"""What of a model's folder decides what the model does: weights, configs, tokenizer, and code that came with it."""


def arguments(plan: Plan) -> dict[str, Any]:
    """Every value that decides the result, by a name that a person understands."""
    recipe = plan.recipe
    student = recipe.distill.student if recipe.distill is not None else None
    models = [*recipe.models, *([student.tokenizer] if student is not None and student.tokenizer is not None else [])]
    made = {stage.out for stage in plan.stages}
    values = {**recipe.arguments(), "out": plan.out, "backend": plan.backend}
    values |= {"compress": compress.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    values |= {f"files of {model}": model_stamp(model) for model in models if str(Path(model)) not in made}
    values |= {f"hash of {data['spec']}": data.get("sha256", data["origin"]) for data in plan.data}
    if student is not None:
        values["distill.student.config"] = f"sha256 {file_sha256(Path(student.config))[:16]}"
    return values


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
