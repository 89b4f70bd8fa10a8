"""The model card of an ONNX folder: a program that runs it, and its figures."""

from __future__ import annotations

from compress.exporters.base import ExportReport
from compress.exporters.interface import DecoderInterface, EncoderInterface

WITH_TOKENIZER = """from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
ids = np.array([tokenizer.encode("Once upon a time")], dtype=np.int64)
"""
WITHOUT_TOKENIZER = "\nids = np.array([[1, 2, 3]], dtype=np.int64)  # token ids; this folder has no tokenizer\n"
SHOW_TEXT = "print(tokenizer.decode(ids[0]))"
SHOW_IDS = "print(ids[0])"

DECODER_PROGRAM = """import numpy as np
import onnxruntime
{tokenizer}session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
inputs = [entry for entry in session.get_inputs() if entry.name.startswith("past_key_values")]
past = {{entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32) for entry in inputs}}
fresh = ids
for _ in range(40):
    total = ids.shape[1]
    feeds = {{
        "input_ids": fresh,
        "attention_mask": np.ones((1, total), np.int64),
        "position_ids": np.arange(total - fresh.shape[1], total)[None],
    }}
    logits, *presents = session.run(None, feeds | past)
    past = dict(zip(past, presents))
    fresh = logits[:, -1:].argmax(-1)
    ids = np.concatenate([ids, fresh], axis=1)
{show}"""

ENCODER_PROGRAM = """import numpy as np
import onnxruntime
{tokenizer}session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
feeds = {{entry.name: np.zeros_like(ids) for entry in session.get_inputs()}}
feeds |= {{"input_ids": ids, "attention_mask": np.ones_like(ids)}}
(output,) = session.run(None, feeds)
print(output.shape)"""


def onnx_card(report: ExportReport, interface: DecoderInterface | EncoderInterface, tokenizer: bool) -> str:
    """README.md of an export."""
    template = DECODER_PROGRAM if isinstance(interface, DecoderInterface) else ENCODER_PROGRAM
    program = template.format(
        tokenizer=WITH_TOKENIZER if tokenizer else WITHOUT_TOKENIZER, show=SHOW_TEXT if tokenizer else SHOW_IDS
    )
    containers = ", ".join(f"{count} in {kind}" for kind, count in report.matrices.items())
    rows = [
        ("parameters", f"{report.parameters:,}"),
        ("bytes of graph and weights", f"{report.model_bytes:,}"),
        ("bits per weight of the blocks' matrices, as stored here", f"{report.container_bits_per_weight:.4f}"),
        ("bits per parameter of the whole file", f"{report.model_bits_per_weight:.4f}"),
        ("matrices", containers),
        ("squared error of rounding to the containers, over the weights' energy", f"{report.rounding_error:.2g}"),
        ("largest relative difference of logits from torch", f"{report.max_relative_error:.2g}"),
        ("opset, IR", f"{report.opset}, {report.ir_version}"),
        ("made with", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
    ]
    table = "\n".join(f"| {label} | {value} |" for label, value in rows)
    return f"""---
library_name: onnx
tags: [compress, onnx]
---
# A {report.kind} for ONNX Runtime

Made with `compress` (the package `model-compress`). To run it, in this folder:

```python
{program}
```

| | |
|---|---|
{table}

Activations are float32. Matrices in 4 or 8 bits are the operator `com.microsoft.MatMulNBits`, which carries the
quantized weights without rounding them again unless the table says so. `report.json` has all figures.
"""
