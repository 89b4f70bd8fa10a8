"""Experts and convolutions rounded with data: from a checkpoint, in memory, after a kill, and without tokens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import compress
from compress.codecs import codec
from compress.events import Event, Events
from compress.formats.native import Artifact
from compress.modeling.structure import matrices
from compress.quantization.allocation import uniform
from compress.quantization.calibrated import UNSEEN
from compress.quantization.modules import PackedExperts
from compress.quantization.options import Ldlq
from compress.quantization.rounders import CalibrationOptions
from compress.quantization.run import quantize_checkpoint
from compress.quantization.target import open_target
from compress.workspace import Workspace
from tests import families
from tests.architectures import TABLE, inputs

INTEGER = codec("integer", group=16)
IDS = torch.randint(3, 90, (12, 16), generator=torch.Generator().manual_seed(4))
EXPERTS = 5
"""The last of which the router of `mixture` never takes."""


class Killed(BaseException):
    """What stands for a kill inside this process."""


def mixture(chosen: int = 2, layers: int = 1) -> transformers.PreTrainedModel:
    """A mixture whose router gives scores v, 2v, -v, -2v and 0 for a number v: the last is never among the best two."""
    sizes = {"num_local_experts": EXPERTS, "num_experts": EXPERTS, "num_experts_per_tok": chosen}
    model = families.build("MixtralForCausalLM", "mixtral", num_hidden_layers=layers, **sizes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.copy_(torch.tensor([1.0, 2.0, -1.0, -2.0, 0.0]).unsqueeze(1) * parameter[:1].clone())
    return model


def packed_rows(model: nn.Module, expert: int) -> list[torch.Tensor]:
    packed = next(module for module in model.modules() if isinstance(module, PackedExperts))
    return [packed.get_buffer(each.name)[expert] for each in (packed.up, packed.down)]


def test_an_expert_without_tokens_is_rounded_for_all_of_the_layers() -> None:
    """As where a router sends every token to every expert."""
    lonely = compress.quantize(mixture(), bits=4.9, codec=INTEGER, data=IDS)
    crowded = compress.quantize(mixture(chosen=EXPERTS), bits=4.9, codec=INTEGER, data=IDS)
    for found, expected in zip(packed_rows(lonely, 4), packed_rows(crowded, 4), strict=True):
        assert torch.equal(found, expected)
    seldom = zip(packed_rows(lonely, 0), packed_rows(crowded, 0), strict=True)
    assert not any(torch.equal(found, expected) for found, expected in seldom)
    nearest = compress.quantize(mixture(), bits=4.9, codec=INTEGER)
    assert not torch.equal(packed_rows(lonely, 4)[0], packed_rows(nearest, 4)[0])


def test_an_expert_is_rounded_for_its_own_tokens_alone() -> None:
    """Another expert may be anything: it makes no difference to this one in the same layer."""
    model, other = mixture(), mixture()
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            other.get_parameter(f"model.layers.0.mlp.experts.{name}")[1].mul_(3)
    first, second = (compress.quantize(each, bits=4.9, codec=INTEGER, data=IDS) for each in (model, other))
    for expert in (0, 2, 3):
        assert all(map(torch.equal, packed_rows(first, expert), packed_rows(second, expert)))
    assert not torch.equal(packed_rows(first, 1)[0], packed_rows(second, 1)[0])


def quantize(source: Path, out: Path, data: Any, listener: Any = None, **more: Any) -> dict[str, Any]:
    target = open_target(source)
    specs = uniform(target.views, INTEGER, 4.9, target.mixing)
    with Workspace.open(out.with_name(f"{out.name}.work"), {}, events=Events([listener] if listener else [])) as work:
        options = CalibrationOptions(data, Ldlq(), **more)
        return quantize_checkpoint(source, out, specs, INTEGER, work, work.events, calibration=options)


def test_a_checkpoint_lists_the_experts_without_tokens(tmp_path: Path) -> None:
    model = mixture(layers=2)
    model.save_pretrained(tmp_path / "m")
    said: list[Event] = []
    report = quantize(tmp_path / "m", tmp_path / "q", IDS, said.append)
    names = [view.name for view in matrices(model) if view.index == 4]
    assert len(names) == 4
    assert sorted(report["unseen_experts"]) == sorted(names)
    assert {row["name"] for row in report["matrices"] if row["status"] == UNSEEN} == set(names)
    warnings = [event.data["text"] for event in said if event.kind == "warning"]
    assert sum("2 matrices of experts got no token" in text for text in warnings) == 2
    tokens = {row["name"]: row["calibration"]["tokens"] for row in report["matrices"]}
    seen = [tokens[f"model.layers.0.mlp.experts.gate_up_proj.{expert}"] for expert in range(4)]
    assert sum(seen) == 2 * IDS.numel()
    in_memory = compress.quantize(copy.deepcopy(model), bits=4.9, codec=INTEGER, data=IDS)
    loaded = compress.load(tmp_path / "q").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in in_memory.state_dict().items())


@pytest.mark.parametrize("title", ["Mixtral", "ResNet", "ViT", "GPT-2"])
def test_goes_on_after_a_kill_with_the_same_bytes(title: str, tmp_path: Path) -> None:
    model = next(one for one in TABLE if one.title == title).build()
    model.save_pretrained(tmp_path / "m")
    data: Any = IDS
    if title in ("ResNet", "ViT"):
        data = [inputs(model, 4, seed) for seed in range(3)]

    def kill(event: Event) -> None:
        if event.kind == "step" and event.data["index"] == 1:
            raise Killed

    quantize(tmp_path / "m", tmp_path / "whole", data)
    with pytest.raises(Killed):
        quantize(tmp_path / "m", tmp_path / "q", data, kill)
    assert not (tmp_path / "q").exists()
    quantize(tmp_path / "m", tmp_path / "q", data)
    quantize(tmp_path / "m", tmp_path / "small", data, budget=0)
    expected = Artifact(tmp_path / "whole")
    for folder in ("q", "small"):
        found = Artifact(tmp_path / folder)
        assert found.modules.keys() == expected.modules.keys()
        for name in expected.modules:
            assert torch.equal(found.matrix(name).payload(), expected.matrix(name).payload()), name
