"""Export targets by name, as recipes and the command line write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compress.errors import UsageError, nearest
from compress.events import Events
from compress.exporters.base import ExportReport
from compress.exporters.bitsandbytes import build_bitsandbytes
from compress.exporters.onnx import build_onnx
from compress.exporters.staging import write_whole
from compress.modeling.loading import load_model
from compress.modeling.resolve import resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BUILDERS: Mapping[str, Callable[..., ExportReport]] = {"bitsandbytes": build_bitsandbytes, "onnx": build_onnx}
"""What writes each format into a new folder, which the caller publishes."""
DTYPES: Mapping[str, torch.dtype | None] = {"bitsandbytes": None, "onnx": torch.float32}
"""In which a model is loaded to be exported; None keeps the stored dtype."""


def export_names() -> list[str]:
    return sorted(BUILDERS)


def export(
    model: PreTrainedModel | str | Path,
    out: str | Path,
    *,
    to: str,
    tokenizer_from: Path | None = None,
    overwrite: bool = False,
    events: Events | None = None,
) -> ExportReport:
    """Write `model`, or the one of that name with its tokenizer, to the folder `out` in the format `to`. Raises
    `UsageError` that names the nearest known format, and what the exporter raises."""
    if to not in BUILDERS:
        raise UsageError(f"There is no export format '{to}'.", remedy=nearest(to, BUILDERS, "There are"))
    if isinstance(model, str | Path):
        tokenizer_from = tokenizer_from or resolve_model(str(model))
        model = load_model(model, dtype=DTYPES[to])
    build = partial(BUILDERS[to], model, tokenizer_from=tokenizer_from, events=events or Events())
    return write_whole(Path(out), overwrite, build)
