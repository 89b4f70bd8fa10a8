"""The typed recipe, version 1. Every field with its unit, range and default; unknown keys are errors.

Paths are relative to the folder that the command runs in; only `distill.student.config`, which belongs to the recipe,
is in a recipe file relative to that file's folder. A recipe of one stage writes its result to `out` itself; one
of several writes `out/distilled`, `out/transformed`, `out/quantized`, `out/<format>`, and `out/report.json`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from compress.recipe.method import Method

Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
DataList = Annotated[
    list[Text], BeforeValidator(lambda value: [value] if isinstance(value, str) else value), Field(min_length=1)
]
"""One source of data or several, one after the other; a single string may stand for a list of one."""


UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_bytes(text: str) -> int:
    """Bytes of a number with a decimal unit: `500MB`, `1.5 GB`, `64000000`. Raises `ValueError` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?B)?", text.strip())
    if match is None:
        raise ValueError("a number of bytes, such as 500MB or 2GB")
    return round(float(match[1]) * UNITS[match[2] or ""])


class Part(BaseModel):
    """Base of the recipe's parts: strict types, no unknown keys, no change once made."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StudentRecipe(Part):
    """A student with random weights, instead of a model that exists."""

    config: Text = Field(
        description="path of the config JSON of a transformers model, in a recipe file relative to its folder"
    )
    tokenizer: Text | None = Field(
        None, description="a model whose tokenizer to use; without one, the teacher's, or else one trained on `data`"
    )


class DistillRecipe(Part):
    """Train the model (the student) on data, to be like a teacher."""

    teacher: Text | None = Field(None, description="a model; without one, losses on labels alone")
    data: DataList = Field(description="sources of text, one after the other")
    losses: list[Method] = Field(min_length=1, description="NAME[:key=value,...]; weight=W weighs a loss in the sum")
    steps: Count = Field(1000, description="optimizer steps")
    batch_size: Count = Field(16, description="sequences per forward pass, of all processes together")
    gradient_accumulation: Count = Field(1, description="forward passes per optimizer step")
    context: int = Field(256, ge=2, description="tokens per sequence")
    learning_rate: float = Field(1e-3, gt=0, description="peak of the schedule")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, ge=0, description="norm to which gradients are clipped; 0 does not clip")
    optimizer: Literal["adamw", "muon"] = "adamw"
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the forward pass; weights are float32")
    compile: bool = Field(False, description="compile the student with torch.compile")
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="how models lie on several processes: whole on each, or sharded; one process heeds it not"
    )
    fused: bool = Field(False, description="compute the losses from hidden states, without ever holding the logits")
    save_every: Count = Field(100, description="steps between checkpoints")
    log_every: Count = Field(10, description="steps between log lines")
    max_seconds: float | None = Field(
        None, gt=0, description="end after this time with the schedule driven by it; the result depends on the machine"
    )
    student: StudentRecipe | None = Field(None, description="start from random weights instead of `model`")


class CalibratedPart(Part):
    """What a stage that may look at data has besides its own fields."""

    data: DataList | None = Field(None, description="sources of text for calibration; without, none is used")
    rows: Count = Field(128, description="rows of calibration data; of an encoder's, as many tokens as these rows")
    context: int | None = Field(None, ge=2, description="tokens of a row; without it 256, or what the model takes")
    max_shard_bytes: Count = Field(5_000_000_000, description="size at which a new weight file is begun")


class TransformRecipe(CalibratedPart):
    """Fold a change of basis into the model's weights: the same function as an ordinary checkpoint."""

    transform: Method = Field(
        Method(name="ost"), description="hadamard, or ost[:key=value,...], which is learned from `data`"
    )
    bits: float | None = Field(
        None, gt=0, le=32, description="bits per weight to learn for; without it matrices are not rounded in the loop"
    )
    codec: Method = Field(Method(name="integer"), description="how matrices are rounded in the loop")
    dtype: Literal["stored", "float32"] = Field("stored", description="of the weights that are written")

    @model_validator(mode="after")
    def _has_data(self) -> TransformRecipe:
        if self.transform.name not in ("hadamard", "ost"):
            raise ValueError(f"the transform {self.transform.name} is none that can be folded: write hadamard or ost")
        if (self.transform.name == "ost") != (self.data is not None):
            what = "needs" if self.data is None else "uses no"
            raise ValueError(f"the transform {self.transform.name} {what} data (--data)")
        return self


class QuantizeRecipe(CalibratedPart):
    """Give the linear maps of the model's blocks few bits."""

    bits: float | None = Field(
        None,
        gt=0,
        le=32,
        description="bits per weight over the target set, everything stored counted; without it the codec's only rate",
    )
    embedding_bits: int | None = Field(
        None, ge=2, le=8, description="bits of a weight of the embedding, in groups of integers; without it, it stays"
    )
    head_bits: int | None = Field(None, ge=2, le=8, description="likewise of the head that scores tokens")
    codec: Method = Field(
        Method(name="half_pyramid"), description="how a matrix becomes bits; pyramid where the result is exported"
    )
    rounding: Method | None = Field(
        None, description="nearest, or ldlq[:key=value,...], which needs data; by default what the data allow"
    )
    transform: Method = Field(
        Method(name="auto"),
        description="what is done to the matrices before rounding: none, hadamard, or ost[:key=value,...], which is "
        "learned from the data; auto: hadamard for calibrated half_pyramid, where no head is untied and nothing is "
        "exported",
    )
    towers: bool = Field(
        False, description="quantize what reads images or sound beside a language model too (without data)"
    )
    allocation: Method = Field(
        Method(name="uniform"),
        description="how the bits are spent: uniform; sensitivity[:rows=N], by what each group of matrices loses at "
        "each rate, which is measured on the data; or evolve[:key=value,...], a search from there",
    )
    first_bits: float | None = Field(
        None, gt=0, le=32, description="bits per weight of the first block; the other blocks get what is left of `bits`"
    )
    last_bits: float | None = Field(None, gt=0, le=32, description="likewise of the last block")
    table: Text | None = Field(
        None,
        description="folder of what the allocation measured, to be used again; without it, `table` in the work folder",
    )
    memory: Text = Field("2GB", description="hidden states that are kept in memory; more than that goes to disk")

    @field_validator("memory")
    @classmethod
    def _memory(cls, text: str) -> str:
        parse_bytes(text)
        return text

    @model_validator(mode="after")
    def _allocation_has_data(self) -> QuantizeRecipe:
        if self.allocation.name != "uniform" and self.data is None:
            raise ValueError(f"the allocation {self.allocation.name} needs data (--data)")
        if self.allocation.name == "uniform" and self.table is not None:
            raise ValueError("a table needs the allocation sensitivity or evolve")
        return self

    @model_validator(mode="after")
    def _rounding_has_data(self) -> QuantizeRecipe:
        learns = self.transform.name == "ost"
        if learns and self.data is None:
            raise ValueError("the transform ost needs data (--data)")
        if self.rounding is not None and (self.rounding.name == "nearest") != (self.data is None):
            if self.rounding.name == "nearest" and learns:
                return self
            what = "uses no data" if self.rounding.name == "nearest" else "needs data (--data)"
            raise ValueError(f"the rounding {self.rounding.name} {what}")
        return self

    @property
    def calibration(self) -> Method | None:
        """What the data are used for when matrices are rounded; None without data."""
        if self.data is None:
            return None
        return self.rounding or Method(name="ldlq")


class ExportRecipe(Part):
    """Write the model in another format."""

    to: Literal["onnx", "bitsandbytes"]


class EvaluateRecipe(Part):
    """Measure the result, and models beside it, on data."""

    data: DataList
    context: int = Field(256, ge=2, description="tokens per window")
    limit: Count | None = Field(None, description="tokens at most; without it, all of the data")
    reference: Text | None = Field(None, description="the model to compare logits with")
    compare: list[Text] = Field([], description="further models to measure, in the same table")
    activations: int | None = Field(
        None, ge=2, le=8, description="bits of the matrices' inputs, in every model but the reference; without, all"
    )
    kv: int | None = Field(None, ge=2, le=8, description="bits of keys and values, likewise")
    kv_group: Count | None = Field(None, description="channels that share a scale of `kv`; without it, a head")
    mix_keys: bool = Field(True, description="round keys after a Hadamard transform of each head")
    tokens_per_second: bool = Field(False, description="speed of decoding, without `activations` and `kv`")
    samples: int = Field(0, ge=0, description="texts to generate")

    @field_validator("kv_group")
    @classmethod
    def _group_has_bits(cls, group: int | None, others: ValidationInfo) -> int | None:
        if group is not None and others.data.get("kv", 0) is None:
            raise ValueError("a group of keys and values that have their bits in `kv`")
        return group


class Recipe(Part):
    """What is wanted: a model, the stages it goes through, and where the result goes."""

    version: Literal[1] = 1
    model: Text | None = Field(None, description="a folder, a hub id, builtin:teacher or builtin:student")
    seed: int = Field(0, ge=0, lt=2**32)
    device: Text = Field("cpu", description="a torch device")
    out: Text = Field(description="folder of the result")
    work: Text | None = Field(None, description="work folder; without it, one beside `out`")
    trust_remote_code: bool = Field(False, description="let a model bring its own code")
    distill: DistillRecipe | None = None
    transform: TransformRecipe | None = None
    quantize: QuantizeRecipe | None = None
    export: list[ExportRecipe] = []
    evaluate: EvaluateRecipe | None = None

    @model_validator(mode="before")
    @classmethod
    def _codec_for_export(cls, data: Any) -> Any:
        """Without a choice, a result that is exported is quantized by a codec that stock containers hold."""
        quantize = data.get("quantize") if isinstance(data, dict) else None
        if not isinstance(quantize, dict) or "codec" in quantize or not data.get("export"):
            return data
        only = data["export"] == [{"to": "bitsandbytes"}]
        return {**data, "quantize": {**quantize, "codec": "nf4" if only else "pyramid"}}

    @model_validator(mode="after")
    def _coherent(self) -> Recipe:
        from_scratch = self.distill is not None and self.distill.student is not None
        if from_scratch == (self.model is not None):
            raise ValueError("exactly one of `model` and `distill.student` names what to start from")
        if not self.stages:
            raise ValueError("at least one of distill, transform, quantize, export, evaluate is needed")
        formats = [export.to for export in self.export]
        if len(set(formats)) < len(formats):
            raise ValueError("`export` names a format twice")
        return self

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the stages that the recipe asks for, in order; one `export` for each format."""
        parts = (("distill", self.distill), ("transform", self.transform), ("quantize", self.quantize))
        names = [name for name, part in parts if part is not None]
        names += [f"export:{export.to}" for export in self.export]
        return (*names, *(["evaluate"] if self.evaluate is not None else []))

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that the recipe names and whose weights it reads, each once."""
        named = [self.model, *([self.distill.teacher] if self.distill is not None else [])]
        if self.evaluate is not None:
            named += [self.evaluate.reference, *self.evaluate.compare]
        return tuple(dict.fromkeys(model for model in named if model is not None))

    def arguments(self) -> dict[str, Any]:
        """Every value by its dotted name: what a work folder compares when a run is taken up again."""
        return flatten(self.model_dump(mode="json", exclude={"work"}))

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON Schema of a recipe file, for editors."""
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **cls.model_json_schema()}


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one flat mapping with dotted names; `{"a": [1, {"b": 2}]}` has `a.0` and `a.1.b`."""
    entries: dict[str, Any]
    if isinstance(value, Mapping) and value:
        entries = dict(value)
    elif isinstance(value, list) and value:
        entries = {str(index): entry for index, entry in enumerate(value)}
    else:
        return {prefix: value}
    return {
        name: leaf
        for key, entry in entries.items()
        for name, leaf in flatten(entry, f"{prefix}.{key}" if prefix else key).items()
    }
