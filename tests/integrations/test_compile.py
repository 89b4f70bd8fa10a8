"""Packed models in graphs: `torch.compile` in one piece, and `torch.export`, which another process can load."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import compress
from compress.codecs.registry import codec_names
from compress.quantization import compiled
from compress.quantization.modules import PackedLinear, packed_modules
from tests import families
from tests.integrations.conftest import Artifact


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def single() -> Any:
    return compress.quantize(families.llama(num_hidden_layers=1), transform="hadamard")


@pytest.mark.parametrize("used", [False, True], ids=["anew", "after generation"])
def test_a_whole_graph(single: Any, used: bool) -> None:
    ids = families.token_ids()
    eager = families.logits(single, ids)
    model = copy.deepcopy(single)
    if used:
        model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    found = families.logits(torch.compile(model, fullgraph=True, backend="aot_eager" if used else "inductor"), ids)
    torch.testing.assert_close(found, eager, rtol=0, atol=1e-5 * float(eager.abs().max()))


@pytest.mark.parametrize("codec", codec_names())
@pytest.mark.parametrize("transform", ["none", "hadamard"])
def test_modules_of_every_codec(codec: str, transform: str) -> None:
    model = nn.ModuleList(packed_modules(_packed(codec, transform)).values())
    for module in list(model)[:2]:
        assert isinstance(module, PackedLinear)
        x = torch.randn(3, module.in_features, generator=torch.Generator().manual_seed(0))
        found = torch.compile(module, fullgraph=True, backend="eager")(x)
        assert torch.equal(found, module(x))
        weight = module.quantized().dequantize()
        torch.testing.assert_close(found, x @ weight.T, rtol=0, atol=1e-5 * float(found.abs().max()))


def _packed(codec: str, transform: str) -> nn.Module:
    return compress.quantize(families.llama(num_hidden_layers=1), codec=codec, transform=transform)


def test_gradient_of_the_activations(single: Any) -> None:
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for model in (single, torch.compile(single, fullgraph=True, backend="aot_eager")):
        x = hidden.clone().requires_grad_()
        model(inputs_embeds=x)[0].square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    module = next(iter(packed_modules(single).values()))
    torch.library.opcheck(
        torch.ops.compress.packed_linear.default,
        (torch.randn(3, 32, requires_grad=True), module.weight, compiled.spec_text(module.spec), module.out_features),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_what_is_prepared_is_kept_and_let_go() -> None:
    module, other = list(packed_modules(_packed("int8", "none")).values())[:4:3]
    gc.collect()
    before, x = len(compiled._PREPARED), torch.randn(2, 32)
    run = torch.compile(module, fullgraph=True, backend="eager")
    first = run(x)
    kept = compiled._PREPARED[module.weight]
    assert torch.equal(run(x), first)
    assert compiled._PREPARED[module.weight] is kept
    module.load_state_dict(other.state_dict())
    assert torch.equal(run(x), other(x))
    assert not torch.equal(run(x), first)
    assert compiled._PREPARED[module.weight] is not kept
    del module, run, kept
    torch._dynamo.reset()
    gc.collect()
    assert len(compiled._PREPARED) == before


class Logits(nn.Module):
    """A model's logits alone, so that an exported program has no type of transformers' among its results."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(ids, use_cache=False)[0]
        return logits


LOADED = """
import sys, torch
import compress.quantization.compiled
program = torch.export.load(sys.argv[1] + "/model.pt2").module()
ids, logits = torch.load(sys.argv[1] + "/logits.pt", weights_only=True)
assert torch.equal(program(ids), logits)
assert 'transformers.modeling_utils' not in sys.modules
"""


def test_export_is_loaded_by_another_process(mixed: Artifact, tmp_path: Path) -> None:
    with torch.no_grad():
        program = torch.export.export(Logits(mixed.load()), (mixed.ids,))
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save((mixed.ids, mixed.logits), tmp_path / "logits.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
