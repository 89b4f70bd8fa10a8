"""What the maps of a block get, against copies that the maps themselves keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.errors import UsageError
from compress.modeling.stack import Call, record
from compress.modeling.structure import find_blocks, matrices, module_matrix
from compress.quantization.inputs import input_rows, inputs_of, structure_of
from tests import families

PLAIN = Call((), {})
QKV = ["q_proj", "k_proj", "v_proj"]


class Net(nn.Module):
    """a and b read the same tensor, c an equal one, d is called twice, e never; f reads what d made."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in "abcdef":
            self.add_module(name, nn.Linear(4, 4))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        first = self.b(x) + self.a(x)
        second = self.d(self.c(x.clone()) + first)
        return self.f(self.d(second))


@pytest.mark.parametrize(
    ("architecture", "family", "groups"),
    [
        (
            "LlamaForCausalLM",
            "llama",
            [
                [f"self_attn.{name}" for name in QKV],
                ["self_attn.o_proj"],
                ["mlp.gate_proj", "mlp.up_proj"],
                ["mlp.down_proj"],
            ],
        ),
        (
            "BertModel",
            "bert",
            [
                [f"attention.self.{name}" for name in ("query", "key", "value")],
                ["attention.output.dense"],
                ["intermediate.dense"],
                ["output.dense"],
            ],
        ),
        (
            "Phi3ForCausalLM",
            "phi3",
            [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]],
        ),
    ],
    ids=["llama", "bert", "phi3"],
)
def test_real_blocks(architecture: str, family: str, groups: list[list[str]]) -> None:
    model = families.build(architecture, family, **({"pad_token_id": 0} if family == "phi3" else {}))
    prefix, block = find_blocks(model)[1]
    (recording,) = record(model, [{"input_ids": families.token_ids()}], find_blocks(model)[0][1])
    names = [view.module.removeprefix(f"{prefix}.") for view in matrices(model) if view.block == 1]
    call = recording.calls[1]
    found = structure_of(block, names[::-1], call, recording.hidden)
    assert [sorted(group) for group in found.groups] == [sorted(group) for group in groups]
    whole = {"self_attn.o_proj": ("self_attn", 1), "mlp.down_proj": ("mlp", -1)}
    assert found.tails == ({} if family == "bert" else whole)  # BERT's last maps are followed by a norm
    inputs, output = inputs_of(block, names, call, recording.hidden, to_the_end=True)
    assert output is not None
    assert torch.equal(output, call.run(block, recording.hidden))
    assert inputs.keys() == set(names)
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: kept.update({name: args[0].clone()})

    handles = [block.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        call.run(block, recording.hidden)
    for handle in handles:
        handle.remove()
    for name in names:
        assert torch.equal(inputs[name], kept[name])


def test_order_groups_and_what_is_never_called() -> None:
    net, x = Net(), torch.randn(2, 3, 4)
    assert structure_of(net, list("abcdef"), PLAIN, x).groups == (("b", "a"), ("c",), ("d",), ("f",), ("e",))
    assert structure_of(net, ["e", "f", "a"], PLAIN, x).groups == (("a",), ("f",), ("e",))


def test_the_pass_ends_once_all_is_known() -> None:
    net, x = Net(), torch.randn(2, 3, 4)
    reached: list[str] = []
    for name in "abcdef":
        net.get_submodule(name).register_forward_hook(lambda module, args, output, name=name: reached.append(name))
    found, _ = inputs_of(net, ["c", "a"], PLAIN, x)
    assert torch.equal(found["a"], x) and torch.equal(found["c"], x)
    assert reached == ["b", "a"]
    reached.clear()
    found, _ = inputs_of(net, ["e", "f"], PLAIN, x)
    assert found.keys() == {"f"} and reached == list("bacddf")
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_a_map_called_twice_gives_its_first_input() -> None:
    net, x = Net(), torch.randn(2, 3, 4)
    with torch.no_grad():
        first = net.c(x) + net.b(x) + net.a(x)
    torch.testing.assert_close(inputs_of(net, ["d"], PLAIN, x)[0]["d"], first)
    torch.testing.assert_close(inputs_of(net, ["d", "f"], PLAIN, x)[0]["d"], first)


def test_hooks_go_after_an_error() -> None:
    net = Net()
    asks: tuple[Any, ...] = (inputs_of, structure_of)
    for ask in asks:
        with pytest.raises(RuntimeError):
            ask(net, ["a", "f"], PLAIN, torch.randn(2, 5))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())


def test_rows_of_a_linear_layer_are_its_tokens() -> None:
    x = torch.arange(24.0).view(2, 3, 4)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    linear = nn.Linear(4, 4)
    assert torch.equal(input_rows(linear, x, None), x.view(6, 4))
    assert input_rows(linear, x, mask)[:, 0].tolist() == [0, 8, 16]
    flat = torch.arange(20.0).view(5, 4)
    assert torch.equal(input_rows(linear, flat, mask), flat)


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(3, 5, 3, padding=1),
        nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
        nn.Conv1d(4, 6, 5, stride=2, padding=3, dilation=2),
        nn.Conv3d(2, 3, (1, 2, 3), padding=(0, 1, 2)),
    ],
)
def test_rows_of_a_convolution_times_its_matrix_are_its_output(convolution: nn.Conv2d) -> None:
    convolution = convolution.double()
    x = torch.randn(2, convolution.in_channels, *(9, 8, 7)[: len(convolution.kernel_size)], dtype=torch.float64)
    expected = convolution(x)
    rows = input_rows(convolution, x, None) @ module_matrix(convolution).T + convolution.bias
    torch.testing.assert_close(rows, expected.movedim(1, -1).reshape(len(rows), -1))


def test_convolutions_share_moments_only_with_the_same_window() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 3, 1)
            self.other = nn.Conv2d(2, 5, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.wide(x), self.narrow(x), self.other(x)], 1)

    names = ["wide", "narrow", "other"]
    assert structure_of(Forked(), names, PLAIN, torch.randn(1, 2, 4, 4)).groups == (("wide", "other"), ("narrow",))


def test_a_convolution_with_reflections_is_refused() -> None:
    convolution = nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")
    with pytest.raises(UsageError, match="'reflect'"):
        input_rows(convolution, torch.randn(1, 2, 4, 4), None)
