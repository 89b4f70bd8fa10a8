"""What the plan of a quantization took for granted about a model's structure, said before anything runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from compress.modeling.structure import MatrixView, find_stacks
from compress.modeling.tested import TESTED

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

NOTABLE = 0.01
"""Share of the blocks' weights in no matrix that is worth a word."""


def structure_notes(model: PreTrainedModel, views: Sequence[MatrixView], towers: bool) -> Iterator[str]:
    """A sentence for each: what an architecture that no test covers was taken for, towers that are left alone, experts,
    weights of the blocks that are in no matrix."""
    stacks = find_stacks(model)
    kind = model.config.model_type
    if kind not in TESTED:
        shape = " and ".join(
            f"{len(stack.blocks)} blocks '{stack.name}'" for stack in stacks if towers or not stack.tower
        )
        last = Counter(view.parameter.removesuffix(".weight").rpartition(".")[2] for view in views)
        yield (
            f"'{kind}' is not among the architectures that are tested; by its structure it was taken for {shape} with "
            f"the linear maps {', '.join(last)}. Compare the result with the original before you rely on it."
        )
    for stack in stacks:
        if stack.tower and not towers:
            size = sum(_size(block) for _, block in stack.blocks)
            yield f"'{stack.name}' ({size:,} parameters) is beside the language model and stays; --towers asks for it"
    experts = {view.parameter: 0 for view in views if view.index is not None}
    if experts:
        each = sum(view.index is not None for view in views) // len(experts)
        yield f"{each} experts in each of {len(experts)} stacked parameters, quantized one by one; routers stay"
    blocks = [block for stack in stacks if towers or not stack.tower for block in stack.blocks]
    yield from _left(blocks, {view.parameter for view in views})


def _left(blocks: Sequence[tuple[str, nn.Module]], packed: set[str]) -> Iterator[str]:
    sizes = {name: one.numel() for prefix, block in blocks for name, one in block.named_parameters(prefix=prefix)}
    left = {name: size for name, size in sizes.items() if name not in packed}
    share = sum(left.values()) / sum(sizes.values())
    if share > NOTABLE:
        largest = max(left, key=left.__getitem__)
        yield f"{share:.1%} of the blocks' weights are in no matrix of the target set, such as '{largest}'; they stay"


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
