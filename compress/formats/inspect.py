"""What is in an artifact, matrix by matrix, after its checksums were verified."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compress.formats.native import Artifact
from compress.modeling.layout import count
from compress.modeling.loading import parameter_count


@dataclass(frozen=True)
class MatrixRow:
    """One quantized matrix. Bits are counted from the stored payload; the errors are those of the artifact's report,
    None without one."""

    name: str
    shape: tuple[int, int]
    codec: str
    width: int
    bits_per_weight: float
    relative_error: float | None
    sqnr_db: float | None


@dataclass(frozen=True)
class Inspection:
    """An artifact's contents. `tables` names the rows that are the embedding or the head; `bits_per_weight` is that of
    all other rows. `verified` counts the files whose sha256 was compared, 0 when there are no checksums."""

    folder: Path
    producer: str
    rows: tuple[MatrixRow, ...]
    tables: tuple[str, ...]
    ignore: tuple[str, ...]
    bits_per_weight: float
    model_bits_per_weight: float
    model_bytes: int
    parameters: int
    verified: int


def inspect_artifact(folder: Path) -> Inspection:
    """Open, verify and list an artifact. Raises `ArtifactError` when a file is missing, changed, or inconsistent.

    `bits_per_weight` is computed from the payloads, not copied from the configuration.
    """
    artifact = Artifact(folder)
    verified = artifact.verify()
    report = artifact.report()
    errors = {row["name"]: row for row in report["matrices"]} if report else {}
    rows = []
    bits = weights = 0
    for name, view in artifact.modules.items():
        matrix, measured = artifact.matrix(name), errors.get(name, {})
        if name not in artifact.tables:
            bits, weights = bits + matrix.bits, weights + count(view.shape)
        rows.append(
            MatrixRow(
                name=name,
                shape=view.shape,
                codec=matrix.spec.codec,
                width=matrix.spec.width,
                bits_per_weight=matrix.bits_per_weight,
                relative_error=measured.get("relative_error"),
                sqnr_db=measured.get("sqnr_db"),
            )
        )
    parameters, size = parameter_count(artifact.model), artifact.checkpoint.total_bytes
    return Inspection(
        folder=folder,
        producer=artifact.config.producer,
        rows=tuple(rows),
        tables=artifact.tables,
        ignore=artifact.config.ignore,
        bits_per_weight=bits / weights,
        model_bits_per_weight=8 * size / parameters,
        model_bytes=size,
        parameters=parameters,
        verified=verified,
    )
