"""From a recipe to its plan.

The memory of a distillation is an estimate: per parameter of the student a weight, a gradient and the optimizer's state
in float32 (two values of AdamW, so 16 bytes in all; Muon keeps one, counted as two), the teacher's weights, per layer
about 68 bytes per position and hidden unit of activations (34 in half precision by Korthikanti et al. 2022, "Reducing
Activation Recomputation in Large Transformer Models", equation 2, without attention scores, which are not stored), and
four float32 values per position and token of the vocabulary.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.data import fingerprint, text_source
from compress.distillation.objective import make_term
from compress.ops import backend
from compress.plan.quantize import QuantizationPlan, plan_quantization
from compress.plan.subject import Subject, read_subject, subject_of

if TYPE_CHECKING:
    from compress.recipe import DistillRecipe, EvaluateRecipe, Recipe

BYTES_PER_TRAINED_PARAMETER = 16
BYTES_PER_ACTIVATION = 68


@dataclass(frozen=True)
class StagePlan:
    """One stage: what it reads (None: random weights), where its result appears (None: in the report alone), what it
    will do, and an estimate of its memory in bytes, the program itself left out."""

    name: str
    source: str | None
    out: str | None
    text: str
    memory_bytes: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Everything that `compress plan` prints. `quantization` is None when nothing is quantized."""

    recipe: Recipe
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

    Raises `UsageError` for unknown methods, options and impossible budgets, `ModelError` and `DataError` for models and
    data that cannot be read or do not fit each other.
    """
    subject = subject_of(recipe)
    outs = _outs(recipe)
    quantization = None if recipe.quantize is None else plan_quantization(recipe.quantize, subject)
    stages: list[StagePlan] = []
    source = recipe.model
    for name in recipe.stages:
        if recipe.distill is not None and name == "distill":
            stages.append(_distill(recipe.distill, recipe, subject, outs[name]))
        elif quantization is not None and name == "quantize":
            stages.append(_quantize(quantization, source, outs[name]))
        elif recipe.evaluate is not None and name == "evaluate":
            stages.append(_evaluate(recipe.evaluate, source))
        else:
            stages.append(StagePlan(name, source, outs[name], f"write {source} as {name.partition(':')[2]}"))
        if name in ("distill", "quantize"):
            source = outs[name]
    return Plan(
        recipe=recipe,
        work=str(_work(recipe)),
        stages=tuple(stages),
        parameters=subject.parameters,
        original_bytes=subject.bytes,
        quantization=quantization,
        backend=backend(),
        python=platform.python_version(),
        data=_data(recipe),
    )


def _outs(recipe: Recipe) -> dict[str, str | None]:
    """Where each stage's result appears: `out` for a recipe of one stage, folders inside it for one of several."""
    if len(recipe.stages) == 1:
        outs: dict[str, str | None] = dict.fromkeys(recipe.stages, recipe.out)
    else:
        inside = {"distill": "distilled", "quantize": "quantized"}
        outs = {name: str(Path(recipe.out, inside.get(name, name.partition(":")[2]))) for name in recipe.stages}
    return {name: None if name == "evaluate" else out for name, out in outs.items()}


def _work(recipe: Recipe) -> Path:
    out = Path(recipe.out)
    return Path(recipe.work) if recipe.work is not None else out.with_name(f"{out.name}.work")


def _distill(part: DistillRecipe, recipe: Recipe, subject: Subject, out: str | None) -> StagePlan:
    # here, because the trainer is slow to import and a plan without distillation does without
    from compress.distillation.trainer import check_vocabularies

    for loss in part.losses:
        make_term(loss.name, dict(loss.options), has_teacher=part.teacher is not None)
    teacher_bytes = 0
    if part.teacher is not None:
        teacher = read_subject(part.teacher, recipe.trust_remote_code)
        check_vocabularies(subject.model, teacher.model)
        teacher_bytes = teacher.parameters * 4
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
    memory = subject.parameters * BYTES_PER_TRAINED_PARAMETER + teacher_bytes + activations + logits
    return StagePlan("distill", recipe.model, out, text, memory, notes)


def _quantize(plan: QuantizationPlan, source: str | None, out: str | None) -> StagePlan:
    text = f"{len(plan.matrices)} matrices with {plan.codec} at {plan.bits_per_weight:.4f} bits per weight"
    notes = ("data-free: no text is used, every weight counts the same",) if plan.data_free else ()
    return StagePlan("quantize", source, out, text, plan.memory_bytes, notes)


def _evaluate(part: EvaluateRecipe, source: str | None) -> StagePlan:
    models = ", ".join(str(model) for model in dict.fromkeys([*part.compare, source]))
    against = f" against {part.reference}" if part.reference is not None else ""
    limit = f", {part.limit:,} tokens at most" if part.limit is not None else ""
    text = f"measure {models}{against} on {' + '.join(part.data)}, windows of {part.context} tokens{limit}"
    return StagePlan("evaluate", source, None, text)


def _data(recipe: Recipe) -> tuple[dict[str, str | int], ...]:
    """The fingerprint of every source of data, read once; of installed packages, which are large, only the versions."""
    parts: Sequence[DistillRecipe | EvaluateRecipe | None] = (recipe.distill, recipe.evaluate)
    sources = {spec: text_source(spec) for part in parts if part is not None for spec in part.data}
    return tuple(
        {"spec": spec, "origin": source.origin} if spec.startswith("packages:") else fingerprint(source).to_dict()
        for spec, source in sources.items()
    )
