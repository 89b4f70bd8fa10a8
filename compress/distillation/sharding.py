"""A model whose parameters lie in parts on several processes (FSDP2), and how it becomes whole again.

Each block of the model is gathered when it computes, and given up after; what stands outside of the blocks (embeddings,
final norm, head) is gathered for the whole step of a student, and lies whole on every process of a teacher. Between two
uses a parameter of n numbers takes n / N on each of N processes, and so do its gradient and the optimizer's state.

What leaves the processes is whole: `whole` makes plain tensors of sharded ones, one at a time, for the first process.
So a checkpoint does not tell how many processes wrote it, and any number can take it up.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from compress.distillation.optimizers import Combined
from compress.errors import ModelError, UsageError
from compress.modeling.structure import find_blocks


def shard(model: PreTrainedModel, device: torch.device | str = "cpu", *, frozen: bool = False) -> PreTrainedModel:
    """Leave on `device` of each process of the default group its part of every parameter of `model`, in place.

    All processes must hold the same values. A `frozen` model (a teacher) has only its blocks sharded, so that its base
    model can be called by itself, once the whole of it was. Call this before an optimizer is made. Raises `UsageError`
    without a process group.
    """
    if not dist.is_initialized():
        raise UsageError(
            "There is one process; to shard a model takes several.",
            remedy="Start with torchrun --nproc-per-node N, or leave out --parallel fsdp.",
        )
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    blocks = [block for _, block in find_blocks(model)]
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    if not frozen:
        fully_shard(model, mesh=mesh)
        return model
    rest = {parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)}
    for parameter in rest:
        parameter.data = parameter.data.to(device)
    fully_shard(model, mesh=mesh, ignored_params=rest)
    return model


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(value: Any, keep: bool = True) -> Any:
    """`value` with every sharded tensor in it, however deep in dicts and lists, as a plain one on the CPU. All
    processes must call it; with `keep` false nothing is kept, and only the others are served."""
    if isinstance(value, DTensor):
        gathered: Tensor = value.full_tensor()
        return gathered.detach().cpu() if keep else None
    if isinstance(value, dict):
        return {key: whole(entry, keep) for key, entry in value.items()}
    if isinstance(value, list):
        return [whole(entry, keep) for entry in value]
    return value


def whole_weights(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """The state dict of a sharded model in plain tensors on the CPU; tied ones are one tensor. All processes must call
    it, and get {} with `keep` false."""
    made: dict[int, Tensor] = {}
    names: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in made:
            made[id(tensor)] = whole(tensor, keep)
        names[name] = made[id(tensor)]
    return {name: tensor.detach().cpu() for name, tensor in names.items()} if keep else {}


@torch.no_grad()
def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Overwrite the sharded `model` by the checkpoint in `folder`; each process reads it and keeps its part."""
    kind: Any = next(base for base in type(model).__mro__ if not issubclass(base, FSDPModule))
    source, report = kind.from_pretrained(folder, config=model.config, dtype=model.dtype, output_loading_info=True)
    if report["missing_keys"] or report["mismatched_keys"]:
        names = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise ModelError(f"The checkpoint '{folder}' lacks {names[0]}.", remedy="Resume from another checkpoint.")
    stored = source.state_dict()
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.copy_(part_of(stored[name], tensor))


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process holds of `like`; all of it if `like` is not sharded."""
    if not isinstance(like, DTensor):
        return tensor
    moved = tensor.to(like.device, like.dtype)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def parts_of_state(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """A whole state dict of `optimizer` with the parts of this process in the place of what is sharded."""
    if isinstance(optimizer, Combined):
        return {name: parts_of_state(state[name], part) for name, part in optimizer.parts.items()}
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = dict(zip(numbers, (each for group in optimizer.param_groups for each in group["params"]), strict=True))
    entries = {
        number: {
            name: part_of(value, parameters[number])
            if isinstance(value, Tensor) and value.shape == parameters[number].shape
            else value
            for name, value in entry.items()
        }
        for number, entry in state["state"].items()
    }
    return {"state": entries, "param_groups": state["param_groups"]}
