"""The comparison that ends a run: models side by side, with the figures that say what was gained and what was lost.

Each model is loaded once, in float32, and measured on the same windows: sizes, the figures of the verb `evaluate`, and
where asked the speed of decoding in torch and in ONNX Runtime. The last model, the result of the run, also writes a few
texts. A model that the run did not export is exported for the measurement and the export removed again.

Where activations, keys or values are to be quantized they are so in every model, also while it writes. The reference
stays what it is, also in a column of its own, unless that is the last one: a model may be measured against itself.
Speeds and exports are of models without it, and a note says so.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.data import text_source, tokenize
from compress.evaluation.evaluate import evaluate
from compress.evaluation.generate import OnnxDecoder, generate_sampled
from compress.evaluation.latency import tokens_per_second
from compress.evaluation.readers import check_readers, load_reader
from compress.exporters import export_onnx
from compress.formats.sizes import model_size
from compress.modeling.loading import kind_of, load_model
from compress.modeling.resolve import resolve_model
from compress.quantization.dynamic import Dynamic, dynamic_quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compress.events import Events
    from compress.recipe import EvaluateRecipe

SHOWN = ("perplexity", "kl_divergence", "cosine", "accuracy")
SAMPLE_PROMPT, SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 16, 48, 0.7


@dataclass(frozen=True)
class Subject:
    """A model of the comparison: the name of its column, where it is, and its ONNX export if the run made one."""

    name: str
    model: str
    onnx: Path | None = None


def compare(
    subjects: Sequence[Subject],
    asked: EvaluateRecipe,
    *,
    scratch: Path,
    events: Events,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> dict[str, dict[str, Any]]:
    """The figures of each subject, by its name. `scratch` is a folder for exports that are removed again."""
    reference = None
    if asked.reference is not None:
        reference = load_model(asked.reference, device=device, trust_remote_code=trust_remote_code)
        kind = kind_of(reference)
        reader = load_reader(kind, asked.reference, trust_remote_code)
        for subject in subjects:
            other = load_reader(kind, subject.model, trust_remote_code)
            check_readers(kind, subject.name, other, asked.reference, reader)
    how = Dynamic.of_bits(asked.activations, asked.kv, asked.kv_group, asked.mix_keys)
    if how.figures() and (asked.tokens_per_second or any(subject.onnx is not None for subject in subjects)):
        events.emit("note", text="Speeds and exports are without quantized activations, keys and values.")
    figures: dict[str, dict[str, Any]] = {}
    with events.stage("evaluate", len(subjects)):
        for index, subject in enumerate(subjects, 1):
            model = load_model(subject.model, device=device, trust_remote_code=trust_remote_code)
            is_last = index == len(subjects)
            figures[subject.name] = _measure(
                subject,
                model,
                reference,
                asked,
                how if is_last or not _is_reference(subject, asked) else Dynamic(),
                scratch,
                trust_remote_code,
                asked.samples if is_last else 0,
            )
            shown = {k: v for k, v in figures[subject.name].items() if k in SHOWN}
            events.emit(
                "step",
                stage="evaluate",
                index=index,
                total=len(subjects),
                name=subject.name,
                seconds_left=None,
                **shown,
            )
    return figures


def _measure(
    subject: Subject,
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    asked: EvaluateRecipe,
    how: Dynamic,
    scratch: Path,
    trust_remote_code: bool,
    samples: int,
) -> dict[str, Any]:
    folder = resolve_model(subject.model)
    kind = kind_of(model)
    reader: Any = load_reader(kind, folder, trust_remote_code)
    figures: dict[str, Any] = asdict(model_size(folder, trust_remote_code))
    figures |= evaluate(
        model,
        data=asked.data,
        reference=reference,
        context=asked.context,
        limit=asked.limit,
        tokenizer=None if kind == "image" else reader,
        image_processor=reader if kind == "image" else None,
        running=partial(dynamic_quantization, how=how),
    )
    figures |= how.figures()
    if asked.tokens_per_second:
        figures |= _speeds(subject, model, scratch, trust_remote_code)
    if samples:
        with dynamic_quantization(model, how):
            figures["samples"] = write_samples(model, reader, asked.data, samples)
    return figures


def _is_reference(subject: Subject, asked: EvaluateRecipe) -> bool:
    return asked.reference is not None and resolve_model(subject.model) == resolve_model(asked.reference)


def _speeds(subject: Subject, model: PreTrainedModel, scratch: Path, trust_remote_code: bool) -> dict[str, Any]:
    """Decoded tokens a second, batch 1: in torch and in ONNX Runtime, both with torch's number of threads."""
    in_torch = tokens_per_second(model)
    folder = subject.onnx
    if folder is None:
        shutil.rmtree(scratch, ignore_errors=True)
        export_onnx(load_model(subject.model, trust_remote_code=trust_remote_code), scratch)
        folder = scratch
    in_ort = tokens_per_second(OnnxDecoder(folder))
    if subject.onnx is None:
        shutil.rmtree(scratch)
    return {
        "tokens_per_second_torch": in_torch.tokens_per_second,
        "tokens_per_second_onnxruntime": in_ort.tokens_per_second,
        "threads": in_torch.threads,
    }


def write_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: list[str], count: int
) -> list[dict[str, str]]:
    """`count` texts drawn at temperature 0.7, each after the first 16 tokens of a window spread over `data`."""
    stream = tokenize(text_source(data), tokenizer)
    starts = [i * (len(stream.ids) - SAMPLE_PROMPT) // count for i in range(count)]
    prompts = torch.stack([stream.ids[start : start + SAMPLE_PROMPT] for start in starts])
    written = generate_sampled(model, prompts.to(model.device), SAMPLE_TOKENS, temperature=SAMPLE_TEMPERATURE, seed=0)
    return [
        {"prompt": str(tokenizer.decode(text[:SAMPLE_PROMPT])), "text": str(tokenizer.decode(text[SAMPLE_PROMPT:]))}
        for text in written
    ]
