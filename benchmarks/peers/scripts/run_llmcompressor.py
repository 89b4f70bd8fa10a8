"""GPTQ by llm-compressor, `oneshot` with the defaults of its GPTQModifier but for bits, group and symmetry, block by
block (`pipeline="sequential"`)."""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from task import linear_maps, load, read_task

task = read_task()
weights = QuantizationArgs(
    num_bits=task.bits, type="int", symmetric=task.symmetric, strategy="group", group_size=task.group
)
modifier = GPTQModifier(
    config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"]
)
rows = task.rows.tolist()
data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
model = load(task.model)
with task.timed():
    oneshot(
        model=model,
        dataset=data,
        recipe=[modifier],
        max_seq_length=task.rows.shape[1],
        num_calibration_samples=len(rows),
        pipeline="sequential",
    )
with torch.inference_mode():
    decoded = {
        name: forward_quantize(module, module.weight, "weight", module.quantization_scheme.weights)
        for name, module in linear_maps(model).items()
    }
args = next(iter(linear_maps(model).values())).quantization_scheme.weights
task.write(decoded)
task.answer(
    "llmcompressor",
    "GPTQ",
    bits_per_weight=task.true_bits(),
    damping=modifier.dampening_frac,
    block_size=modifier.block_size,
    order=args.actorder.value,
    observer=args.observer,
)
