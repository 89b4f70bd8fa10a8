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

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.codecs.base import QuantizedMatrix
from compress.errors import ArtifactError
from compress.formats.card import model_card
from compress.formats.companions import copy_companions
from compress.formats.config import QuantizationConfig
from compress.modeling.io import Checkpoint
from compress.modeling.layout import Entry
from compress.modeling.loading import CONFIG, load_config, read_config, skeleton
from compress.modeling.names import stored_names
from compress.modeling.resolve import model_name
from compress.modeling.structure import MatrixView, matrices
from compress.modeling.writer import ShardWriter
from compress.storage import ARTIFACT_MARK, seal, verify_seal, write_json

REPORT = "report.json"
CARD = "README.md"


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
    (folder / CARD).write_text(model_card(model_name(source), report), encoding="utf-8")
    seal(folder)


class Artifact:
    """A native artifact, opened: headers and configuration are read and checked, payloads when they are asked for.

    Raises `ArtifactError` for a folder that is damaged or no artifact of this package.
    """

    def __init__(self, folder: Path, trust_remote_code: bool = False) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise ArtifactError(f"There is no folder '{folder}'.", remedy="Name an artifact of `compress quantize`.")
        self.config = QuantizationConfig.from_dict(read_config(folder).get("quantization_config") or {})
        self.checkpoint = Checkpoint(folder, ArtifactError)
        self.model = skeleton(load_config(folder, trust_remote_code), trust_remote_code)
        views = {view.module: view for view in matrices(self.model)}
        self._specs = self.config.by_module(views, self.model.base_model_prefix)
        self._views = {name: views[name] for name in self._specs}
        self._stored = stored_names(self.checkpoint.names(), self.model)

    @property
    def modules(self) -> Mapping[str, MatrixView]:
        """The quantized matrices by module name, in the order of the model."""
        return self._views

    def matrix(self, name: str) -> QuantizedMatrix:
        """The quantized matrix of module `name`, read now."""
        view = self._views[name]
        payload = self.checkpoint.read(self._stored.get(view.parameter, view.parameter))
        return QuantizedMatrix.from_payload(self._specs[name], view.shape, payload)

    def report(self) -> dict[str, Any] | None:
        """`report.json`, or None for an artifact that `save_pretrained` wrote."""
        path = self.folder / REPORT
        return json.loads(path.read_bytes()) if path.is_file() else None

    def verify(self) -> int:
        """Compare every file with `compress.json`; returns how many. Raises `ArtifactError` naming the first that is
        missing or changed. 0 when there is no such file, as after `save_pretrained`."""
        return verify_seal(self.folder) if (self.folder / ARTIFACT_MARK).is_file() else 0
