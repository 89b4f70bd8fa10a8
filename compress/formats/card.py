"""The model card of an artifact: how to load it, and its figures."""

from __future__ import annotations

from typing import Any


def model_card(name: str, report: dict[str, Any], architecture: str) -> str:
    """README.md of a quantized model called `name`, with the figures of its `report`; `architecture` is its class in
    transformers."""
    rows = [
        ("bits per weight of the quantized matrices", f"{report['bits_per_weight']:.4f}"),
        ("bits per parameter of the whole model", f"{report['model_bits_per_weight']:.4f}"),
        ("bytes of the weight files", f"{report['model_bytes']:,}"),
        ("bytes of the original's", f"{report['original_bytes']:,}"),
        ("matrices", f"{len(report['matrices'])}"),
        ("rounding", report["rounding"]),
        ("transform", report["transform"]),
        ("mean relative error of a matrix", f"{_mean_error(report):.4g}"),
    ]
    table = "\n".join(f"| {label} | {value} |" for label, value in rows)
    return f"""---
base_model: {name}
library_name: transformers
tags: [compress, quantized]
---
# {name}, quantized

Made with `compress` (the package `model-compress`). Load it with transformers; the import registers the format:

```python
import compress
from transformers import {architecture}

model = {architecture}.from_pretrained("this folder")
```

| | |
|---|---|
{table}

`report.json` has these figures for each matrix; `compress inspect` prints them and verifies the checksums.
"""


def _mean_error(report: dict[str, Any]) -> float:
    errors: list[float] = [row["relative_error"] for row in report["matrices"]]
    return sum(errors) / len(errors)
