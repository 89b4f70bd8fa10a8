"""GPTQ by GPTQModel, with the defaults of its QuantizeConfig but for bits, group and symmetry. It works in float32 (by
default it would take bfloat16 on a processor). The packed model is saved, read again and decoded to float16, which is
what its scales are stored in."""

from __future__ import annotations

import os
import tempfile

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # with the one that it takes on two cores, its own check of the pool fails

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from task import linear_maps, load, read_task

task = read_task()
config = QuantizeConfig(bits=task.bits, group_size=task.group, sym=task.symmetric, device="cpu")
examples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in task.rows]
model = GPTQModel.load(str(task.model), config, dtype=torch.float32)
with task.timed():
    model.quantize(examples, batch_size=8)
with tempfile.TemporaryDirectory() as folder:
    model.save(folder)
    packed = GPTQModel.load(folder, backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model
    modules = dict(packed.named_modules())
    with torch.inference_mode():
        weights = {name: modules[name].dequantize_weight().T for name in linear_maps(load(task.model))}
task.write(weights)
task.answer(
    "GPTQModel",
    "GPTQ",
    bits_per_weight=task.true_bits(),
    damping=config.damp_percent,
    desc_act=config.desc_act,
    group_aware=config.act_group_aware,
    mse=config.mse,
)
