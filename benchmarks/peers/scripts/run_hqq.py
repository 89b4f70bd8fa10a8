"""HQQ: scales and zero points by half-quadratic optimisation, without data. The settings of its BaseQuantizeConfig
(groups along the input, float zero points, rounded ones at 4 bits); every map has a float zero point, so that
`--symmetric` is not defined here."""

from __future__ import annotations

import torch
from hqq.core.quantize import BaseQuantizeConfig, Quantizer
from task import linear_maps, load, read_task

task = read_task()
config = BaseQuantizeConfig(nbits=task.bits, group_size=task.group)["weight_quant_params"]
weights = {}
with torch.inference_mode():
    for name, module in linear_maps(load(task.model)).items():
        with task.timed():
            codes, meta = Quantizer.quantize(module.weight, device="cpu", compute_dtype=torch.float32, **config)
        weights[name] = Quantizer.dequantize(codes, meta).reshape(module.weight.shape)
task.write(weights)
task.answer("hqq", "HQQ", bits_per_weight=task.true_bits(zero=16), axis=config["axis"], round_zero=config["round_zero"])
