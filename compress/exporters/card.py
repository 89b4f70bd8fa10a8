"""The model card of an ONNX folder: a program that runs it, and its figures."""

from __future__ import annotations

from compress.exporters.base import ExportReport
from compress.exporters.interface import ANY_SIZES, DecoderInterface, ImageInterface, Interface

NOUNS = {"decoder": "A decoder", "encoder": "An encoder", "image": "An image model"}

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

IMAGE_PROGRAM = """import numpy as np
import onnxruntime
{reader}options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.disable_quant_qdq", "1")  # decode convolutions once, and not at each call
session = onnxruntime.InferenceSession("model.onnx", options, providers=["CPUExecutionProvider"])
(output,) = session.run(None, {{"pixel_values": pixels}})
print(output.shape)"""
WITH_PROCESSOR = """from transformers import AutoImageProcessor

picture = np.zeros((480, 640, {channels}), np.uint8)  # or np.asarray(Image.open(...))
processor = AutoImageProcessor.from_pretrained(".", backend="pil")
pixels = processor(picture, input_data_format="channels_last", return_tensors="np")["pixel_values"]
"""
WITHOUT_PROCESSOR = "\npixels = np.zeros((1, {sizes}), np.float32)  # normalized; this folder has no image processor\n"


def _program(interface: Interface, reader: bool) -> str:
    """How to run the file, with a tokenizer or image processor beside it (`reader`) or without."""
    if isinstance(interface, ImageInterface):
        sizes = ", ".join(map(str, (interface.channels, *(interface.size or ANY_SIZES[0]))))
        made = (WITH_PROCESSOR if reader else WITHOUT_PROCESSOR).format(channels=interface.channels, sizes=sizes)
        return IMAGE_PROGRAM.format(reader=made)
    template = DECODER_PROGRAM if isinstance(interface, DecoderInterface) else ENCODER_PROGRAM
    return template.format(
        tokenizer=WITH_TOKENIZER if reader else WITHOUT_TOKENIZER, show=SHOW_TEXT if reader else SHOW_IDS
    )


def onnx_card(report: ExportReport, interface: Interface, reader: bool) -> str:
    """README.md of an export; `reader`: a tokenizer or image processor is beside it."""
    program = _program(interface, reader)
    containers = ", ".join(f"{count} in {kind}" for kind, count in report.matrices.items())
    rows = [
        ("what is in this folder", report.part),
        ("parameters", f"{report.parameters:,}"),
        ("bytes of graph and weights", f"{report.model_bytes:,}"),
        ("bits per weight of the blocks' matrices, as stored here", f"{report.container_bits_per_weight:.4f}"),
        ("bits per parameter of the whole file", f"{report.model_bits_per_weight:.4f}"),
        ("matrices", containers),
        ("squared error of rounding to the containers, over the weights' energy", f"{report.rounding_error:.2g}"),
        ("largest relative difference of the output from torch", f"{report.max_relative_error:.2g}"),
        ("opset, IR", f"{report.opset}, {report.ir_version}"),
        ("made with", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
    ]
    table = "\n".join(f"| {label} | {value} |" for label, value in rows)
    return f"""---
library_name: onnx
tags: [compress, onnx]
---
# {NOUNS[report.kind]} for ONNX Runtime

Made with `compress` (the package `model-compress`). To run it, in this folder:

```python
{program}
```

| | |
|---|---|
{table}

Activations are float32. Matrices in 4 or 8 bits are the operator `com.microsoft.MatMulNBits`, those of convolutions are
`DequantizeLinear` in front of `Conv`; both carry the quantized weights without rounding them again unless the table
says so. `report.json` has all figures.
"""
