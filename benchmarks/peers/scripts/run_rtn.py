"""Round to nearest on a uniform grid, without data: the floor. With q = 2^bits - 1 steps and a group's weights w,
asymmetric: scale (max - min) / q and an integer zero point; symmetric: scale max|w| / (2^(bits - 1) - 1) and codes from
-2^(bits - 1). Scales are rounded to float16 before they are used."""

from __future__ import annotations

import torch
from task import Task, linear_maps, load, read_task
from torch import Tensor


def round_to_nearest(weight: Tensor, task: Task) -> Tensor:
    groups = weight.reshape(-1, task.group)
    low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
    top = 2**task.bits - 1
    if task.symmetric:
        step = torch.maximum(-low, high) / (top // 2)
        zero = torch.full_like(step, top // 2 + 1)
    else:
        step = (high - low) / top
        zero = (-low / step).round()
    step = step.half().float()
    return ((groups / step).round().add(zero).clamp(0, top) - zero).mul(step).view_as(weight)


task = read_task()
weights = {}
with torch.inference_mode():
    for name, module in linear_maps(load(task.model)).items():
        with task.timed():
            weights[name] = round_to_nearest(module.weight, task)
task.write(weights)
task.answer("torch", "RTN", bits_per_weight=task.true_bits())
