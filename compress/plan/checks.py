"""What can be known to fail before it runs: models that do not fit each other, the data's windows, or this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import ModelError, UsageError
from compress.evaluation.ort import require_packages
from compress.hardware import require_device
from compress.modeling.loading import (
    TOKENIZERS,
    check_room,
    check_tokenizers,
    check_vocabularies,
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
    if recipe.export or (recipe.evaluate is not None and recipe.evaluate.tokens_per_second):
        require_packages(*ONNX)


def check_models(recipe: Recipe, subject: Subject, subjects: Mapping[str, Subject]) -> None:
    """Check `subject`, which goes through the stages, and the models that `recipe` names: `subjects` by their names."""
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
        check_context("evaluate.context", part.context, one)
        if not one.is_causal:
            _check_encoder(name, part)
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


def _check_encoder(name: str, part: EvaluateRecipe) -> None:
    if part.reference is None:
        raise UsageError(
            f"'{name}' is an encoder, which is measured against another model.",
            remedy="Name one as evaluate.reference.",
        )
    for key, asked in (("samples", part.samples), ("tokens_per_second", part.tokens_per_second), ("kv", part.kv)):
        if asked:
            raise UsageError(f"'{name}' is an encoder and writes no text.", remedy=f"Remove evaluate.{key}.")


def _check_pair(name: str, one: Subject, reference: Subject, trust_remote_code: bool) -> None:
    if one.is_causal != reference.is_causal:
        kinds = ["a decoder" if subject.is_causal else "an encoder" for subject in (one, reference)]
        raise ModelError(
            f"'{name}' is {kinds[0]}, and the reference '{reference.name}' is {kinds[1]}.",
            remedy="Name a reference of the same kind.",
        )
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
