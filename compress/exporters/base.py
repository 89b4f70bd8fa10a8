"""What every exporter returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

WHOLE = "the whole model"


@dataclass(frozen=True)
class ExportReport:
    """An export and how well it agrees with the model.

    `container_bits_per_weight` = all bits that the file stores for the target set (codes and scales of its containers,
    32 for each weight left in float32) over the weights of the set. `matrices` counts the set's matrices by container.
    `model_bytes` is the size of the weights, in ONNX with the graph; `files` has it and the files copied from the
    model. `errors` has, for each input that was run in both, max |logit difference| / max |logit|. `opset` and
    `ir_version` are those of ONNX, None in other formats. `rounding_error` is the largest squared error over the
    energy of a matrix that no container carries exactly and that was rounded to 8 bits; 0 where all are exact.
    `part` says what of the model is in the files, and `parameters` are counted in that part.
    """

    format: str
    kind: Literal["decoder", "encoder", "image"]
    container_bits_per_weight: float
    model_bits_per_weight: float
    matrices: Mapping[str, int]
    parameters: int
    model_bytes: int
    files: Mapping[str, int]
    versions: Mapping[str, str]
    provider: str
    errors: Mapping[str, float]
    rounding_error: float = 0.0
    part: str = WHOLE
    opset: int | None = None
    ir_version: int | None = None

    @property
    def max_relative_error(self) -> float:
        return max(self.errors.values())

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "max_relative_error": self.max_relative_error}
