"""The native artifact: a transformers model folder whose quantized matrices are packed.

| file | what |
|---|---|
| `model*.safetensors`, index | every tensor; a quantized `<module>.weight` is its payload, flat `int8` |
| `config.json` | the original's, with `quantization_config` (see `config`) |
| `report.json`, `README.md` | figures by matrix; the model card |
| `compress.json` | size and sha256 of every other file |
| the rest | tokenizer, generation config and what else of a model lay beside the weights (`companions`), copied |

A reader that does not know the method finds an int8 vector where it wants a matrix, and refuses; were the payload
under another name, it would warn and go on with random weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.codecs.base import QuantizedMatrix
from compress.codecs.registry import codec_of
from compress.errors import ArtifactError, located, quoted
from compress.formats.card import model_card
from compress.formats.companions import copy_companions
from compress.formats.config import QuantizationConfig
from compress.formats.tables import tables_of
from compress.modeling.bounds import check_complete, check_tensors
from compress.modeling.folders import CONFIG, not_a_model
from compress.modeling.io import Checkpoint
from compress.modeling.layout import Entry
from compress.modeling.loading import load_config, read_config, skeleton
from compress.modeling.resolve import model_name
from compress.modeling.structure import MatrixView, matrices
from compress.modeling.weights import StoredWeights
from compress.modeling.writer import ShardWriter
from compress.plain_json import parse_json
from compress.storage import ARTIFACT_MARK, seal, verify_seal, write_json

REPORT = "report.json"
CARD = "README.md"
COPY = "The file is damaged or belongs to another model: copy the folder again."


def write_weights(
    folder: Path, entries: Sequence[Entry], tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int
) -> None:
    """Write the shards of an artifact into the existing `folder`: `entries` plan every tensor, `tensors` yields them,
    one at a time and in any order."""
    with ShardWriter(folder, entries, max_shard_bytes) as writer:
        for name, tensor in tensors:
            writer.add(name, tensor)


def write_artifact(
    folder: Path,
    source: Path,
    config: QuantizationConfig,
    report: dict[str, Any],
    changes: Mapping[str, Any] | None = None,
) -> None:
    """Make a whole artifact of `folder`, which holds the weights already: configuration, what lay beside the weights
    in `source`, report, card, and last the checksums. The caller staged the folder and publishes it afterwards.
    `changes` are fields of config.json that a transform of the weights asks for."""
    copy_companions(source, folder)
    write_json(folder / CONFIG, {**read_config(source), **(changes or {}), "quantization_config": config.to_dict()})
    write_json(folder / REPORT, report)
    (folder / CARD).write_text(model_card(model_name(source), report, _class_of(source)), encoding="utf-8")
    seal(folder)


class Artifact:
    """A native artifact, opened: headers and configuration are read and checked, payloads when they are asked for.

    Raises `ArtifactError` for a folder that is damaged or no artifact of this package.
    """

    def __init__(self, folder: Path, trust_remote_code: bool = False) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise ArtifactError(f"There is no folder '{folder}'.", remedy="Name an artifact of `compress quantize`.")
        fields = _quantization_config(folder)
        with located(folder / CONFIG, ArtifactError, "Restore its config.json."):
            self.config = QuantizationConfig.from_dict(fields)
        self.checkpoint = Checkpoint(folder, ArtifactError)
        self.model = skeleton(load_config(folder, trust_remote_code), trust_remote_code)
        views = matrices(self.model, towers=True)
        places = list(dict.fromkeys(view.place for view in views))
        self._specs = self.config.by_module(places, self.model.base_model_prefix)
        self._views = {view.name: view for view in views if view.place in self._specs}
        self._tables = tables_of(self.config, self.model)
        for table, spec in self._tables:
            self._specs[table.view.place], self._views[table.view.name] = spec, table.view
        self._weights = StoredWeights(self.checkpoint, self.model)
        with located(folder, ArtifactError, "Copy the whole folder again."):
            tied = {name for table, _ in self._tables for name in table.parameters}
            check_tensors(self.model, self._weights, {view.parameter for view in self._views.values()} | tied)
            check_complete(self.model, self._weights)
        for name in self._views:
            self._check_payload(name)

    @property
    def modules(self) -> Mapping[str, MatrixView]:
        """The quantized matrices by name, in the order of the model, tables last."""
        return self._views

    @property
    def tables(self) -> tuple[str, ...]:
        """Those that are tables: embedding and head."""
        return tuple(table.view.name for table, _ in self._tables)

    def matrix(self, name: str) -> QuantizedMatrix:
        """The quantized matrix `name`, read now."""
        view = self._views[name]
        payload = self._weights.read(view.parameter)
        if view.index is not None:
            payload = payload[view.index]
        with located(f"{self.folder}' in matrix '{name}", ArtifactError, COPY):
            return QuantizedMatrix.from_payload(self._specs[view.place], view.shape, payload)

    def _check_payload(self, name: str) -> None:
        """Raise `ArtifactError` unless the payload of matrix `name` has, by its header, the type and the length that
        its description asks for."""
        view = self._views[name]
        entry, spec = self._weights.entry(view.parameter), self._specs[view.place]
        with located(f"{self.folder}' in matrix '{name}", ArtifactError, COPY):
            needed = codec_of(spec).bits(spec, view.shape) // 8
            experts = () if view.index is None else self.model.get_parameter(view.parameter).shape[:1]
            if entry.dtype != "I8" or entry.shape != (*experts, needed):
                raise ArtifactError(
                    f"A {spec.codec} matrix {view.shape[0]} x {view.shape[1]} of {spec.width} bits per {spec.dim} "
                    f"weights is {needed} bytes of int8{f' for each of {experts[0]} experts' if experts else ''}; the "
                    f"payload is {quoted(list(entry.shape))} of {entry.dtype}."
                )

    def report(self) -> dict[str, Any] | None:
        """`report.json`, or None for an artifact that `save_pretrained` wrote."""
        path = self.folder / REPORT
        if not path.is_file():
            return None
        try:
            report = parse_json(path.read_bytes())
        except ValueError as error:
            raise ArtifactError(f"'{path}' is not JSON: {error}.", remedy=COPY) from error
        rows = report.get("matrices") if isinstance(report, dict) else None
        if not isinstance(rows, list) or not all(map(_is_figures, rows)):
            raise ArtifactError(f"'{path}' has no list of matrices with their names and errors.", remedy=COPY)
        return report

    def verify(self) -> int:
        """Compare every file with `compress.json`; returns how many. Raises `ArtifactError` naming the first that is
        missing or changed. 0 when there is no such file, as after `save_pretrained`."""
        return verify_seal(self.folder) if (self.folder / ARTIFACT_MARK).is_file() else 0


def _class_of(source: Path) -> str:
    """The class to load the model in `source` with."""
    named = read_config(source).get("architectures")
    return str(named[0]) if named else "AutoModel"


def _is_figures(row: object) -> bool:
    """Whether this is what a report says of a matrix: its name, and errors that are numbers or left out."""
    match row:
        case {"name": str(), **rest}:
            return all(isinstance(rest.get(figure), int | float | None) for figure in ("relative_error", "sqnr_db"))
    return False


def _quantization_config(folder: Path) -> Mapping[str, Any]:
    found = read_config(folder).get("quantization_config")
    if found is None and (folder / "model.onnx").is_file():
        raise not_a_model(folder, CONFIG, ArtifactError)
    if not isinstance(found, dict):
        raise ArtifactError(
            f"The model in '{folder}' is not quantized (quantization_config is {quoted(found)}).",
            remedy="Name an artifact of `compress quantize`.",
        )
    return found
