"""From a recipe to its plan.

The memory of a distillation is an estimate: per parameter of the student a weight, a gradient and the optimizer's state
in float32 (two values of AdamW, so 16 bytes in all; Muon keeps one, counted as two), the teacher's weights, per layer
about 68 bytes per position and hidden unit of activations (34 in half precision by Korthikanti et al. 2022, "Reducing
Activation Recomputation in Large Transformer Models", equation 2, without attention scores, which are not stored), and
four float32 values per position and token of the vocabulary.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from compress.data import data_source, fingerprint, is_images
from compress.distillation.objective import Objective, make_term, setting_of
from compress.exporters.supported import part_of
from compress.losses.fused.plan import CPU_BYTES
from compress.modeling.structure import Convolution
from compress.ops import backend
from compress.plan.checks import check_machine, check_models
from compress.plan.places import Places, places_of
from compress.plan.quantize import QuantizationPlan, draft_quantization, plan_quantization
from compress.plan.stage import StagePlan
from compress.plan.subject import Subject, read_subjects, subject_of
from compress.plan.sweep import kept_table
from compress.plan.transform import plan_transform

if TYPE_CHECKING:
    from compress.recipe import DistillRecipe, EvaluateRecipe, Recipe

BYTES_PER_TRAINED_PARAMETER = 16
BYTES_PER_ACTIVATION = 68


@dataclass(frozen=True)
class Plan:
    """Everything that `compress plan` prints. `quantization` is None when nothing is quantized."""

    recipe: Recipe
    out: str
    work: str
    stages: tuple[StagePlan, ...]
    parameters: int
    original_bytes: int
    quantization: QuantizationPlan | None
    backend: str
    python: str
    data: tuple[dict[str, str | int], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data. The figures of the quantization are on top; `memory_bytes` is the peak over the stages."""
        plain = {name: value for name, value in vars(self).items() if name not in ("recipe", "quantization")}
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            **plain,
            "stages": [asdict(stage) for stage in self.stages],
            **(asdict(self.quantization) if self.quantization is not None else {}),
            "memory_bytes": max((stage.memory_bytes or 0 for stage in self.stages), default=0),
        }


def make_plan(recipe: Recipe) -> Plan:
    """The plan of `recipe`.

    Raises `UsageError` for unknown methods, options, impossible budgets and places, `ModelError` and `DataError` for
    models and data that cannot be read or do not fit each other, `DependencyError` for a package that is missing.
    """
    places = places_of(recipe)
    check_machine(recipe)
    subjects = read_subjects(recipe, {str(place) for place in places.stages.values() if place is not None})
    subject = subject_of(recipe, subjects)
    check_models(recipe, subject, subjects)
    quantization = None
    if recipe.quantize is not None:
        draft = draft_quantization(recipe.quantize, subject, recipe.trust_remote_code, exported=bool(recipe.export))
        quantization = plan_quantization(draft, kept_table(recipe, subject, places))
    return Plan(
        recipe=recipe,
        out=str(places.out),
        work=str(places.work),
        stages=tuple(_stages(recipe, places, subject, subjects, quantization)),
        parameters=subject.parameters,
        original_bytes=subject.bytes,
        quantization=quantization,
        backend=backend(),
        python=platform.python_version(),
        data=_data(recipe),
    )


def _stages(
    recipe: Recipe,
    places: Places,
    subject: Subject,
    subjects: Mapping[str, Subject],
    quantization: QuantizationPlan | None,
) -> Iterator[StagePlan]:
    """The stages in order; each reads what the one before has made."""
    source = recipe.model
    for name, place in places.stages.items():
        out = None if place is None else str(place)
        if recipe.distill is not None and name == "distill":
            yield _distill(recipe.distill, source, subject, subjects.get(recipe.distill.teacher or ""), out)
        elif recipe.transform is not None and name == "transform":
            yield plan_transform(recipe.transform, subject, source, out)
        elif quantization is not None and name == "quantize":
            yield _quantize(quantization, source, out, recipe.device)
        elif recipe.evaluate is not None and name == "evaluate":
            yield _evaluate(recipe.evaluate, source)
        else:
            to = name.partition(":")[2]
            of_onnx = (*_part(subject), *_rounding(quantization, subject)) if to == "onnx" else ()
            notes = (*of_onnx, *_on_the_cpu(recipe.device))
            yield StagePlan(name, source, out, f"write {source} as {to}", notes=notes)
        if name in ("distill", "transform", "quantize"):
            source = out


def _distill(
    part: DistillRecipe, source: str | None, subject: Subject, teacher: Subject | None, out: str | None
) -> StagePlan:
    other = None if teacher is None else teacher.model.config
    setting = setting_of(subject.model.config, other, pieces=lambda ids: [""] * len(ids))
    terms = [make_term(one.name, one.options, setting, has_teacher=part.teacher is not None) for one in part.losses]
    objective = Objective(terms)
    if part.fused:
        objective.by_position()
    tokens = part.steps * part.batch_size * part.gradient_accumulation * part.context
    against = f"against {part.teacher}" if part.teacher is not None else "on labels alone"
    losses = " + ".join(str(loss) for loss in part.losses)
    text = f"train {subject.name} {against} ({losses}): {part.steps:,} steps, {tokens:,} tokens"
    notes: tuple[str, ...] = ()
    if part.max_seconds is not None:
        text += f", at most {part.max_seconds:g} s"
        notes = ("a clock ends the training: it does not give the same bytes twice, and when killed it starts anew",)
    config = subject.model.config.get_text_config()
    positions = part.batch_size * part.context
    activations = positions * config.num_hidden_layers * config.hidden_size * BYTES_PER_ACTIVATION
    logits = positions * config.vocab_size * 4 * 4
    if part.fused:
        logits = min(logits, 2 * CPU_BYTES)
    of_teacher = 0 if teacher is None else teacher.parameters * 4
    memory = subject.parameters * BYTES_PER_TRAINED_PARAMETER + of_teacher + activations + logits
    return StagePlan("distill", source, out, text, memory, notes)


def _quantize(plan: QuantizationPlan, source: str | None, out: str | None, device: str) -> StagePlan:
    text = f"{len(plan.matrices)} matrices with {plan.codec} at {plan.bits_per_weight:.4f} bits per weight"
    for table in plan.tables:
        text += f", '{table.name}' at {table.bits_per_weight:.4f}"
    if not plan.data_free:
        text += f", rounded by {plan.rounding}"
    notes = (*plan.notes, *plan.guesses, *(_on_the_cpu(device) if plan.data_free else ()))
    return StagePlan("quantize", source, out, text, plan.memory_bytes, notes)


def _part(subject: Subject) -> tuple[str, ...]:
    part = part_of(subject.model)
    return () if part is None else (part,)


def _rounding(plan: QuantizationPlan | None, subject: Subject) -> tuple[str, ...]:
    if plan is None or any(name.startswith("onnx") for name in plan.containers):
        return ()
    text = f"no ONNX container carries {plan.codec} exactly: its matrices are rounded to 8 bits once more"
    if any(isinstance(subject.model.get_submodule(matrix.name), Convolution) for matrix in plan.matrices):
        text += ", those of convolutions only where they are no integers times scales"
    return (text,)


def _on_the_cpu(device: str) -> tuple[str, ...]:
    return (f"on the CPU: this stage makes no use of {device}",) if device != "cpu" else ()


def _evaluate(part: EvaluateRecipe, source: str | None) -> StagePlan:
    models = ", ".join([*(model for model in part.compare if model != source), str(source)])
    against = f" against {part.reference}" if part.reference is not None else ""
    images = all(map(is_images, part.data))
    limit = f", {part.limit:,} {'images' if images else 'tokens'} at most" if part.limit is not None else ""
    windows = "" if images else f", windows of {part.context} tokens"
    text = f"measure {models}{against} on {' + '.join(part.data)}{windows}{limit}"
    asked = {"activations": part.activations, "keys and values": part.kv}
    bits = [f"{what} in {number} bits" for what, number in asked.items() if number is not None]
    return StagePlan("evaluate", source, None, ", ".join([text, *bits]))


def _data(recipe: Recipe) -> tuple[dict[str, str | int], ...]:
    """The fingerprint of every source of data, read once; of installed packages, which are large, only the versions."""
    parts = (recipe.distill, recipe.transform, recipe.quantize, recipe.evaluate)
    sources = {spec: data_source(spec) for part in parts if part is not None for spec in part.data or ()}
    return tuple(
        {"spec": spec, "origin": source.origin} if spec.startswith("packages:") else fingerprint(source).to_dict()
        for spec, source in sources.items()
    )
