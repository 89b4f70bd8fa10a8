"""Passes of a block give what the block itself gives, however much of it is kept or replayed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.modeling.stack import Call, record
from compress.modeling.structure import find_blocks, matrices
from compress.quantization.activations import Activations
from compress.quantization.inputs import structure_of
from compress.quantization.passes import Passes
from tests import families

CPU = torch.device("cpu")
BUDGETS = [0, 3000, 1 << 30]


def subject(architecture: str, family: str) -> tuple[nn.Module, list[str], list[Call], Activations]:
    """The second block of a tiny model, its linear maps, and three batches of hidden states."""
    model = families.build(architecture, family).requires_grad_(False)
    prefix, block = find_blocks(model)[1]
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 96, (2, 7), generator=generator)} for _ in range(3)]
    recordings = list(record(model, batches, find_blocks(model)[0][1]))
    hidden = Activations([tuple(one.hidden.shape) for one in recordings], 1 << 30)
    for one in recordings:
        hidden.write(one.hidden)
    names = [view.module.removeprefix(f"{prefix}.") for view in matrices(model) if view.block == 1]
    return block, names, [one.calls[1] for one in recordings], hidden


def inputs_and_output(
    block: nn.Module, names: list[str], call: Call, hidden: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args: found.update({name: args[0].clone()})

    handles = [block.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    output = call.run(block, hidden)
    for handle in handles:
        handle.remove()
    return found, output


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("architecture", "family"), [("LlamaForCausalLM", "llama"), ("BertForMaskedLM", "bert")])
def test_a_block_that_changes_between_its_passes(architecture: str, family: str, budget: int) -> None:
    block, names, calls, hidden = subject(architecture, family)
    found = structure_of(block, names, calls[0], hidden.read(0, CPU))
    firsts = [group[0] for group in found.groups]
    passes = Passes(block, firsts, hidden, calls, CPU, budget, tails=found.tails)
    modules = dict(block.named_modules())
    for group in found.groups:
        for batch, call in enumerate(calls):
            expected, _ = inputs_and_output(block, names, call, hidden.read(batch, CPU))
            x = passes.input(group[0], batch)
            assert x is not None
            assert torch.equal(x, expected[group[0]])
        for name in group:
            weight = block.get_parameter(f"{name}.weight")
            weight.copy_((8 * weight).round() / 8)
    for batch, call in enumerate(calls):
        assert torch.equal(passes.output(batch), call.run(block, hidden.read(batch, CPU)))
    assert dict(block.named_modules()) == modules


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_block_that_stays(budget: int) -> None:
    block, names, calls, hidden = subject("LlamaForCausalLM", "llama")
    outputs = Activations(hidden.shapes, 1 << 30)
    firsts = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    passes = Passes(block, firsts, hidden, calls, CPU, budget, outputs=outputs)
    for name in firsts:
        for batch, call in enumerate(calls):
            expected, output = inputs_and_output(block, names, call, hidden.read(batch, CPU))
            x = passes.input(name, batch)
            assert x is not None
            assert torch.equal(x, expected[name])
            assert torch.equal(outputs.read(batch, CPU), output)
    assert outputs.written == len(calls)


def test_replays_save_passes() -> None:
    """With room for what is kept, queries are computed once for a batch that needs them, not once for each input."""
    block, names, calls, hidden = subject("LlamaForCausalLM", "llama")
    found = structure_of(block, names, calls[0], hidden.read(0, CPU))
    counts = []
    for budget in (0, 1 << 30):
        passes = Passes(block, names, hidden, calls, CPU, budget, tails=found.tails)
        called: list[Tensor] = []
        query = block.get_submodule("self_attn.q_proj")
        handle = query.register_forward_hook(lambda module, args, output, called=called: called.append(output))
        for group in found.groups:
            for batch in range(len(calls)):
                passes.input(group[0], batch)
        for batch in range(len(calls)):
            passes.output(batch)
        handle.remove()
        counts.append(len(called))
    assert counts == [4 * len(calls), len(calls)]


class Odd(nn.Module):
    """A block that uses more of its MLP than what the module returns: a replay of it would not do."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Bent()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(x)
        return y + self.mlp.seen


class Bent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.seen = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        inner = self.up(x).relu()
        self.seen = inner.mean()
        y: Tensor = self.down(inner)
        return y


def test_a_module_that_does_more_is_not_replayed() -> None:
    torch.manual_seed(0)
    block = Odd().requires_grad_(False)
    calls = [Call((), {})] * 2
    hidden = Activations([(2, 3, 4)] * 2, 1 << 30)
    for _ in calls:
        hidden.write(torch.randn(2, 3, 4))
    found = structure_of(block, ["mlp.up", "mlp.down"], calls[0], hidden.read(0, CPU))
    assert found.tails == {"mlp.down": ("mlp", -1)}
    passes = Passes(block, ["mlp.up", "mlp.down"], hidden, calls, CPU, 1 << 30, tails=found.tails)
    for name in ("mlp.up", "mlp.down"):
        for batch in range(2):
            passes.input(name, batch)
    for batch, call in enumerate(calls):
        assert torch.equal(passes.output(batch), call.run(block, hidden.read(batch, CPU)))
