"""The model card of a bitsandbytes folder: a program that runs it, and its figures."""

from __future__ import annotations

from compress.codecs.base import CodecSpec
from compress.codecs.normal_float import Int8Config
from compress.exporters.base import ExportReport

INT8 = "LLM.int8 rounds activations to 8 bits as well; weights alone are as exact as the table says."
TABLE = """On processors with AVX512-BF16, bitsandbytes 0.50 repacks 4-bit weights in eval mode: scales lose bits, and
matrices whose rows are no multiple of 32 fail. To keep the weights as they are there, after loading:

```python
from bitsandbytes.nn import Linear4bit

for module in model.modules():
    if isinstance(module, Linear4bit):
        module.support_avx512bf16_for_cpu = False
```"""


def bitsandbytes_card(report: ExportReport, spec: CodecSpec, architecture: str) -> str:
    """README.md of an export of the class `architecture`."""
    rows = [
        ("parameters", f"{report.parameters:,}"),
        ("bytes of the weights", f"{report.model_bytes:,}"),
        ("bits per weight of the quantized matrices, as stored here", f"{report.container_bits_per_weight:.4f}"),
        ("bits per parameter of all weights", f"{report.model_bits_per_weight:.4f}"),
        ("quantized matrices", ", ".join(f"{count} in {kind}" for kind, count in report.matrices.items())),
        *(
            (f"relative difference of {name} from the artifact", f"{error:.2g}")
            for name, error in report.errors.items()
        ),
        ("made with", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
    ]
    table = "\n".join(f"| {label} | {value} |" for label, value in rows)
    return f"""---
library_name: transformers
tags: [compress, bitsandbytes]
---
# For bitsandbytes: {report.kind}

Made with `compress` (the package `model-compress`). To load it, in this folder, with bitsandbytes installed:

```python
from transformers import {architecture}

model = {architecture}.from_pretrained(".")
```

| | |
|---|---|
{table}

{INT8 if spec.codec == Int8Config.name else TABLE}
"""
