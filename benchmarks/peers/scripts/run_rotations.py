"""Rotations by llm-compressor in front of its GPTQ or its rounding to the nearest, `--setting rounding=gptq|rtn`.

`--setting rotation=NAME`, and `none`:

- `spinquant`: SpinQuantModifier with its defaults, Hadamard matrices R1 (residual stream) and R2 (values), folded.
- `uncentred`: the same without its centring of the embedding, which takes the mean from every row. Behind a LayerNorm
  nothing changes by that; RMSNorm subtracts no mean, so that the model is another one before anything is rounded.
- `quarot`: R1, R2 and R4, the online one in front of the down projection, with random signs (Hadamard matrices without
  them are of orders 2^n), uncentred.
- `quip`: QuIPModifier with its defaults, every map's input rotated online.

`--group -1`: one scale to an output channel, as in the papers' W4A16. OUT becomes a folder with a model, since
rotations change more than the quantized maps, and a tied head is untied. A map's weight there is what the map does,
read off by running it on the identity: online rotations are part of it. They, and the untied head, are not counted in
the bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import QuIPModifier, SpinQuantModifier
from task import Task, linear_maps, load, read_task
from torch import nn


class Uncentred(SpinQuantModifier):
    def _center_embeddings(self, model: nn.Module) -> None:
        """Leaves them as they are."""


ROTATIONS: dict[str, Callable[[], list[Modifier]]] = {
    "none": list,
    "spinquant": lambda: [SpinQuantModifier()],
    "uncentred": lambda: [Uncentred()],
    "quarot": lambda: [Uncentred(rotations=["R1", "R2", "R4"], transform_type="random-hadamard")],
    "quip": lambda: [QuIPModifier()],
}
ROUNDINGS = {"gptq": GPTQModifier, "rtn": QuantizationModifier}


def rounding(task: Task) -> Modifier:
    kind = {"strategy": "group", "group_size": task.group} if task.group > 0 else {"strategy": "channel"}
    weights = QuantizationArgs(num_bits=task.bits, type="int", symmetric=task.symmetric, **kind)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return ROUNDINGS[task.settings["rounding"]](config_groups={"group_0": scheme}, ignore=["lm_head"])


def plain(model: nn.Module, task: Task) -> nn.Module:
    """A model of the same class without llm-compressor's parts, whose maps have the weights that they act with."""
    result = load(task.model)
    result.config.tie_word_embeddings = model.config.tie_word_embeddings
    if not result.config.tie_word_embeddings:
        result.lm_head.weight = nn.Parameter(result.lm_head.weight.detach().clone())
    found = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            parameter.copy_(found[name])
        for name, module in linear_maps(model).items():
            result.get_submodule(name).weight.copy_(module(torch.eye(module.in_features)).T)
    return result


def stored_bits(model: nn.Module, task: Task) -> float:
    """Codes of b bits a weight, and 16 bits to a scale with b more for its zero point where the grid is asymmetric."""
    maps = linear_maps(model).values()
    scales = sum(module.weight_scale.numel() for module in maps)
    zero = 0 if task.symmetric else task.bits
    return task.bits + (16 + zero) * scales / sum(module.weight.numel() for module in maps)


task = read_task()
rows = task.rows.tolist()
data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
model = load(task.model)
with task.timed():
    oneshot(
        model=model,
        dataset=data,
        recipe=[*ROTATIONS[task.settings["rotation"]](), rounding(task)],
        max_seq_length=task.rows.shape[1],
        num_calibration_samples=len(rows),
        pipeline="sequential",
    )
plain(model, task).save_pretrained(task.out)
args = next(iter(linear_maps(model).values())).quantization_scheme.weights
task.answer(
    "llmcompressor",
    task.settings["rounding"],
    bits_per_weight=stored_bits(model, task),
    rotation=task.settings["rotation"],
    group=task.group,
    observer=args.observer,
)
