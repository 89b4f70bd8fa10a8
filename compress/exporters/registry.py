"""Export targets by name, as recipes and the command line write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import UsageError, nearest
from compress.events import Events
from compress.exporters.base import ExportReport
from compress.exporters.onnx import export_onnx

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPORTERS: Mapping[str, Callable[..., ExportReport]] = {"onnx": export_onnx}


def export_names() -> list[str]:
    return sorted(EXPORTERS)


def export(
    model: PreTrainedModel,
    out: str | Path,
    *,
    to: str,
    tokenizer_from: Path | None = None,
    overwrite: bool = False,
    events: Events | None = None,
) -> ExportReport:
    """Write `model` to the folder `out` in the format `to`. Raises `UsageError` that names the nearest known format,
    and what the exporter raises."""
    if to not in EXPORTERS:
        raise UsageError(f"There is no export format '{to}'.", remedy=nearest(to, EXPORTERS, "There are"))
    return EXPORTERS[to](
        model, Path(out), tokenizer_from=tokenizer_from, overwrite=overwrite, events=events or Events()
    )
