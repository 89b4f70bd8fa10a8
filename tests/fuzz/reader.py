"""What is fuzzed: everything that reads an artifact, and what must hold of it.

An artifact is refused with a `CompressError`, or what it decodes to is finite and has the shape of the model's weights,
and is the same whichever reader read it, ours or `from_pretrained`. In `from_pretrained` an error of transformers or
safetensors is a refusal too; one that comes out of this package's code is not.
"""

from __future__ import annotations

import os
import traceback
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from compress.codecs.base import QuantizedMatrix
from compress.errors import CompressError
from compress.formats.inspect import inspect_artifact
from compress.formats.native import Artifact
from compress.modeling.loading import load_model
from compress.quantization.modules import PackedExperts, packed_modules
from compress.storage import verify_weights

OURS = f"{os.sep}compress{os.sep}"


@dataclass(frozen=True)
class Reading:
    """`refused`: the message of our reader, None if it accepted. `loaded`: whether transformers did. `peak`: bytes that
    Python had allocated at most while the folder was opened, verified and its payloads were read; None if not
    measured."""

    refused: str | None
    loaded: bool
    peak: int | None


class FindingError(AssertionError):
    """A reading that must not be."""


def read(folder: Path, measure: bool = False, transformers: bool = True) -> Reading:
    """Read the artifact in every way. Raises `FindingError`, or the error that nobody foresaw."""
    peak, refused, artifact = None, None, None
    if measure:
        tracemalloc.start()
    try:
        artifact = Artifact(folder)
        verify_weights(folder)
        artifact.verify()
        for name in artifact.modules:
            artifact.matrix(name)
        for name in artifact.checkpoint.names():
            artifact.checkpoint.read(name)
    except CompressError as error:
        refused = checked_message(error)
    finally:
        if measure:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    decoded = decode(artifact) if artifact is not None else {}
    try:
        inspect_artifact(folder)
        if refused is None:
            load_model(folder)
    except CompressError as error:
        refused = refused or checked_message(error)
    loaded = transformers and load(folder, decoded)
    return Reading(refused, loaded, peak)


def checked_message(error: CompressError) -> str:
    text = str(error)
    if not error.remedy:
        raise FindingError(f"no remedy: {text}") from error
    if not all(mark.isprintable() or mark == "\n" for mark in text) or len(text) > 3000:
        raise FindingError(f"a message that cannot be shown: {text!r:.300}") from error
    return text


def decode(artifact: Artifact) -> dict[str, torch.Tensor]:
    """The matrices that can be decoded, each finite and of its shape."""
    decoded = {}
    for name, view in artifact.modules.items():
        try:
            weight = artifact.matrix(name).dequantize()
        except CompressError as error:
            checked_message(error)
            continue
        if tuple(weight.shape) != view.shape or not bool(torch.isfinite(weight).all()):
            raise FindingError(f"'{name}' decodes to {list(weight.shape)}, not finite or not {view.shape}")
        decoded[name] = weight
    return decoded


def packed_matrices(model: torch.nn.Module) -> Iterator[tuple[str, QuantizedMatrix]]:
    """By the names of the matrices' views."""
    for name, module in packed_modules(model).items():
        if not isinstance(module, PackedExperts):
            yield name, module.quantized()
            continue
        for projection in (module.up, module.down):
            for index in range(projection.experts):
                yield f"{name}.{projection.name}.{index}", module.quantized(projection, index)


def load(folder: Path, decoded: dict[str, torch.Tensor]) -> bool:
    """Whether `from_pretrained` accepts the folder; then its matrices are those of our reader."""
    try:
        images = b"ForImageClassification" in (folder / "config.json").read_bytes()
        auto = AutoModelForImageClassification if images else AutoModelForCausalLM
        model = auto.from_pretrained(folder, use_safetensors=True)
        weights = {name: matrix.dequantize() for name, matrix in packed_matrices(model)}
    except CompressError:
        return False
    except Exception as error:
        if any(OURS in frame.filename for frame in traceback.extract_tb(error.__traceback__)[2:]):
            raise
        return False
    for name, weight in weights.items():
        if name in decoded and not torch.equal(weight, decoded[name]):
            raise FindingError(f"'{name}' is another matrix in transformers than in our reader")
    return True
