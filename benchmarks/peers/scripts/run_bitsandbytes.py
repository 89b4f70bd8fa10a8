"""The 4-bit tables of bitsandbytes, without data: NF4 or FP4 (`--setting table=fp4`), a float32 scale to a block of
`--group` weights or, with `--setting double=1`, scales of 8 bits with a float32 to 256 of them."""

from __future__ import annotations

import torch
from bitsandbytes import functional
from task import linear_maps, load, read_task

SECOND_BLOCK = 256

task = read_task()
if task.bits != 4:
    raise SystemExit("The tables of bitsandbytes have 16 values: give --bits 4.")
table = task.settings.get("table", "nf4")
double = task.settings.get("double", "0") == "1"
weights = {}
with torch.inference_mode():
    for name, module in linear_maps(load(task.model)).items():
        with task.timed():
            codes, state = functional.quantize_4bit(
                module.weight.contiguous(), blocksize=task.group, quant_type=table, compress_statistics=double
            )
        weights[name] = functional.dequantize_4bit(codes, state)
task.write(weights)
task.answer(
    "bitsandbytes",
    f"{table.upper()}{' double' if double else ''}",
    bits_per_weight=task.true_bits(scale=8 + 32 / SECOND_BLOCK if double else 32, zero=0),
    table=table,
    double=double,
)
