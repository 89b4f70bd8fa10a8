"""What can be known to fail before it runs: models that do not fit each other, the data's windows, or this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from compress.data import require_kind
from compress.errors import ExportError, ModelError, UsageError
from compress.evaluation.evaluate import KINDS, MEASURES
from compress.evaluation.ort import require_packages
from compress.exporters.bitsandbytes import require_bitsandbytes
from compress.exporters.supported import require_exportable
from compress.hardware import require_device
from compress.modeling.loading import (
    TOKENIZERS,
    Kind,
    check_room,
    check_tokenizers,
    check_vocabularies,
    kind_of,
    load_tokenizer,
    require_causal,
    require_unquantized,
)
from compress.modeling.resolve import resolve_model
from compress.plan.subject import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from compress.recipe import DistillRecipe, EvaluateRecipe, Recipe

ONNX = ("onnx", "onnxscript", "onnxruntime")


def check_machine(recipe: Recipe) -> None:
    """Raises `UsageError` for a device that torch does not have here, `DependencyError` for a missing package."""
    require_device(recipe.device)
    formats = {part.to for part in recipe.export}
    if "onnx" in formats or (recipe.evaluate is not None and recipe.evaluate.tokens_per_second):
        require_packages(*ONNX)
    if "bitsandbytes" in formats:
        require_bitsandbytes()


def _check_tables(recipe: Recipe) -> None:
    """Raises `UsageError` for tables that are quantized and then exported to a format without such."""
    part = recipe.quantize
    tables = part is not None and (part.embedding_bits, part.head_bits) != (None, None)
    if tables and any(export.to == "bitsandbytes" for export in recipe.export):
        raise UsageError(
            "bitsandbytes has no quantized embeddings, and no head quantized like them.",
            remedy="Leave out quantize.embedding_bits and quantize.head_bits, or that export.",
        )


def check_models(recipe: Recipe, subject: Subject, subjects: Mapping[str, Subject]) -> None:
    """Check `subject`, which goes through the stages, and the models that `recipe` names: `subjects` by their names.
    Raises `ExportError` for one that is to be exported and cannot be, and what the checks below raise."""
    _check_data(recipe, subject)
    _check_tables(recipe)
    if any(part.to == "onnx" for part in recipe.export):
        require_exportable(subject.model)
    if recipe.distill is not None:
        teacher = subjects.get(recipe.distill.teacher or "")
        check_distillation(recipe.distill, subject, teacher, recipe.trust_remote_code)
    for name, part in (("transform", recipe.transform), ("quantize", recipe.quantize)):
        if part is not None and part.data is not None and part.context is not None:
            check_context(f"{name}.context", part.context, subject)
    if recipe.evaluate is not None:
        compared = {name: subjects[name] for name in recipe.evaluate.compare if name in subjects}
        reference = subjects.get(recipe.evaluate.reference or "")
        check_evaluation(recipe.evaluate, {**compared, subject.name: subject}, reference, recipe.trust_remote_code)


def _check_data(recipe: Recipe, subject: Subject) -> None:
    """Raises `DataError` for text where the model reads images, and the other way round."""
    if recipe.distill is not None:
        require_kind("causal", recipe.distill.data, subject.name)
    for part in (recipe.transform, recipe.quantize):
        if part is not None and part.data is not None:
            require_kind(kind_of(subject.model), part.data, subject.name)


def check_distillation(part: DistillRecipe, student: Subject, teacher: Subject | None, trust_remote_code: bool) -> None:
    """Raises `ModelError` for models that cannot be trained so, `UsageError` for rows that are too long for them."""
    require_unquantized(student.model.config, student.name, "Distil into the original model.")
    for one in (student, *([teacher] if teacher is not None else [])):
        require_causal(one.model.config, one.name)
        check_context("distill.context", part.context, one)
    named = part.student.tokenizer if part.student is not None else None
    folder = resolve_model(named) if named is not None else student.folder
    if teacher is not None:
        tokenizer = _check_tokenizers(named or student.name, folder, teacher, trust_remote_code)
        if tokenizer is None:
            check_vocabularies(student.name, student.model, teacher.name, teacher.model)
        else:
            check_room(tokenizer, student=student.model, teacher=teacher.model)


def check_evaluation(
    part: EvaluateRecipe, measured: Mapping[str, Subject], reference: Subject | None, trust_remote_code: bool
) -> None:
    """Raises `UsageError` for figures that a model does not have, `ModelError` for one that is not like the reference.

    `measured` are the models by the name that they have in the recipe.
    """
    for name, one in measured.items():
        kind = kind_of(one.model)
        if kind != "speech":
            require_kind(kind, part.data, name)
        check_context("evaluate.context", part.context, one)
        _check_figures(name, kind, part)
        if part.tokens_per_second:
            _check_speed(name, one)
        if reference is not None:
            _check_pair(name, one, reference, trust_remote_code)
    if reference is not None:
        check_context("evaluate.context", part.context, reference)


def check_context(key: str, context: int, subject: Subject) -> None:
    """Raises `UsageError` when `context` tokens, asked for by the recipe's `key`, are more than the model has positions
    for."""
    longest = subject.positions
    if longest is not None and context > longest:
        raise UsageError(
            f"'{subject.name}' takes {longest} tokens, and {key} asks for {context}.",
            remedy=f"Use --context {longest}.",
        )


def _check_figures(name: str, kind: Kind, part: EvaluateRecipe) -> None:
    if kind not in MEASURES:
        raise UsageError(f"'{name}' is {KINDS[kind]}, which has no figures.", remedy="Remove evaluate.")
    if kind == "encoder" and part.reference is None:
        raise UsageError(
            f"'{name}' is an encoder, which is measured against another model.",
            remedy="Name one as evaluate.reference.",
        )
    asked = {"samples": part.samples, "tokens_per_second": part.tokens_per_second, "kv": part.kv}
    for key in (key for key, value in asked.items() if value and kind != "causal"):
        what = "writes no text" if kind != "seq2seq" else "goes on with no text"
        raise UsageError(f"'{name}' is {KINDS[kind]} and {what}.", remedy=f"Remove evaluate.{key}.")


def _check_speed(name: str, one: Subject) -> None:
    """The speed is also that of an export."""
    try:
        require_exportable(one.model)
    except ExportError as error:
        raise UsageError(
            f"'{name}' has no speed in ONNX Runtime. {error.message}", remedy="Remove evaluate.tokens_per_second."
        ) from error


def _check_pair(name: str, one: Subject, reference: Subject, trust_remote_code: bool) -> None:
    kind, other = kind_of(one.model), kind_of(reference.model)
    if kind != other:
        raise ModelError(
            f"'{name}' is {KINDS[kind]}, and the reference '{reference.name}' is {KINDS[other]}.",
            remedy="Name a reference of the same kind.",
        )
    if kind == "image":
        return
    check_vocabularies(name, one.model, reference.name, reference.model)
    _check_tokenizers(name, one.folder, reference, trust_remote_code)


def _check_tokenizers(
    name: str, folder: Path | None, other: Subject, trust_remote_code: bool
) -> PreTrainedTokenizerBase | None:
    """Compare the tokenizers of two models and return the first; None unless both have one in their folder."""
    if folder is None or other.folder is None:
        return None
    if not all(any((place / file).is_file() for file in TOKENIZERS) for place in (folder, other.folder)):
        return None
    first, second = (load_tokenizer(place, trust_remote_code) for place in (folder, other.folder))
    check_tokenizers(name, first, other.name, second)
    return first
