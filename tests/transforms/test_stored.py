"""Mixed matrices as they are stored: payload, bits, description, packed modules, artifacts; and what is not mixed stays
what it was."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from compress.codecs import CodecSpec, QuantizedMatrix, codec, codec_of
from compress.errors import ArtifactError, CodecError
from compress.exporters.containers import container_of
from compress.formats.config import QuantizationConfig
from compress.modeling.sites import Sites
from compress.modeling.structure import matrices
from compress.quantization.modules import PackedLinear
from compress.transforms.incoherence import online_mixing, view_signs
from compress.transforms.matrices import mix_weight, unmix_weight
from compress.transforms.signs import MIXINGS, matrix_signs
from tests import families
from tests.codecs.payloads import normal, relative_error

SHAPE = (24, 44)


def mixed_matrix(name: str, width: int, mixing: str, shape: tuple[int, int] = SHAPE) -> QuantizedMatrix:
    rounder, signs = codec(name), matrix_signs(mixing, shape, 0, "m", "g")
    target = mix_weight(normal(*shape), signs)
    return rounder.quantize(target, rounder.spec(width)).mixed(signs)


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize(("name", "width"), [("half_pyramid", 26), ("pyramid", 51), ("pvq", 52), ("integer", 4)])
def test_payload_round_trip(name: str, width: int, mixing: str) -> None:
    matrix = mixed_matrix(name, width, mixing)
    spec = matrix.spec
    payload = matrix.payload()
    stored = 8 * {"none": 0, "input": 6, "output": 3, "both": 9}[mixing]
    assert matrix.bits == 8 * payload.numel() == codec_of(spec).bits(spec, SHAPE)
    assert matrix.bits == matrix.plain.bits + stored
    again = QuantizedMatrix.from_payload(spec, SHAPE, payload)
    assert again.signs.mixing == mixing == spec.mixing
    assert torch.equal(again.payload(), payload)
    assert torch.equal(again.plain.payload(), payload[: payload.numel() - stored // 8])
    assert torch.equal(again.dequantize(), matrix.dequantize())
    expected = unmix_weight(matrix.plain.dequantize(), matrix_signs(mixing, SHAPE, 0, "m", "g"))
    torch.testing.assert_close(again.dequantize(), expected, rtol=0, atol=1e-6)
    assert relative_error(normal(*SHAPE), again) < 0.1
    with pytest.raises(ArtifactError, match="24 x 44"):
        QuantizedMatrix.from_payload(spec, SHAPE, payload[:-1])


@pytest.mark.parametrize("mixing", MIXINGS)
def test_payload_by_the_page(mixing: str) -> None:
    """W from the bytes, by the formulas of docs/formats.md; the codec's own part has its reader elsewhere."""
    matrix = mixed_matrix("half_pyramid", 26, mixing, (12, 44))
    raw = bytes(matrix.payload().numpy().tobytes())
    weight = matrix.plain.dequantize().double()
    for side, width, mixed in (
        ("output", 12, mixing in ("output", "both")),
        ("input", 44, mixing in ("input", "both")),
    ):
        if not mixed:
            continue
        size = -(-width // 8)
        stored, raw = raw[-size:], raw[:-size]
        signs = [-1 if stored[i // 8] >> i % 8 & 1 else 1 for i in range(width)]
        q = torch.tensor([[signs[i] * entry(width, i, j) for j in range(width)] for i in range(width)]).double()
        weight = q @ weight if side == "output" else weight @ q.t()
    assert raw == bytes(matrix.plain.payload().numpy().tobytes())
    torch.testing.assert_close(matrix.dequantize().double(), weight, rtol=0, atol=1e-6)


def entry(width: int, i: int, j: int) -> float:
    """Q[i, j] without its sign."""
    power = width & -width
    m = width // power
    (u, v), (column, frequency) = divmod(i, m), divmod(j, m)
    hadamard = (-1) ** (u & column).bit_count() / math.sqrt(power)
    cosine = math.sqrt(2 / m) * math.cos(math.pi * (2 * v + 1) * frequency / (2 * m))
    return hadamard * (cosine if frequency else math.sqrt(1 / m))


def test_integers_are_those_of_the_plain_form() -> None:
    matrix = mixed_matrix("half_pyramid", 26, "input")
    with pytest.raises(CodecError, match="plain form"):
        matrix.integers()
    integers, scales = matrix.plain.integers()
    product = (integers * scales.repeat_interleave(8, 1))[:, :44]
    torch.testing.assert_close(product, matrix.plain.dequantize())


def test_description() -> None:
    spec = codec("half_pyramid").spec(26)
    assert "mixing" not in spec.to_dict() and CodecSpec.from_dict(spec.to_dict()) == spec
    for mixing in MIXINGS:
        other = replace(spec, mixing=mixing)
        assert CodecSpec.from_dict(json.loads(json.dumps(other.to_dict()))) == other
        assert (other == spec) == (mixing == "none") == (hash(other) == hash(spec))
    for wrong in ("all", 3, None, True):
        with pytest.raises(ArtifactError, match="as its 'mixing'"):
            CodecSpec.from_dict({**spec.to_dict(), "mixing": wrong})


@pytest.mark.parametrize("default", ["none", "input"])
def test_configuration(default: str) -> None:
    """A module may differ from the default by having a mixing, another one, or none."""
    spec = codec("half_pyramid").spec(26)
    words = {"a": default, "b": default, "c": "both", "d": "none", "e": "input"}
    specs = {name: replace(spec, mixing=word) for name, word in words.items()}
    config = QuantizationConfig.from_specs(specs, [], 3.3)
    again = QuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.by_module(list(specs), "") == specs


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize(("name", "width"), [("half_pyramid", 26), ("pyramid", 51)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_packed_linear(name: str, width: int, mixing: str, dtype: torch.dtype) -> None:
    """The map of the weight in the original basis, for few rows and many, with a gradient, and through its state."""
    matrix = mixed_matrix(name, width, mixing)
    linear = nn.Linear(44, 24).to(dtype)
    module = PackedLinear.from_matrix(linear, matrix)
    empty = PackedLinear.empty_like(linear, matrix.spec)
    empty.load_state_dict(module.state_dict())
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for rows in (1, 3, 40):
        x = normal(rows, 2, 44).to(dtype)
        expected = functional.linear(x, matrix.dequantize().to(dtype), linear.bias)
        with torch.no_grad():
            for each in (module, module, empty, copy.deepcopy(module)):
                torch.testing.assert_close(each(x), expected, rtol=tolerance, atol=4 * tolerance)
    x = normal(2, 44).to(dtype).requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None
    gradient = matrix.dequantize().to(dtype).sum(0).expand(2, 44)
    torch.testing.assert_close(x.grad, gradient, rtol=tolerance, atol=40 * tolerance)
    torch.testing.assert_close(module.to_module(dtype).weight, matrix.dequantize().to(dtype))


def test_container_is_of_the_original_basis() -> None:
    """A codec whose plain matrices fit exactly; mixed they are rounded, which the container reports."""
    matrix = mixed_matrix("pyramid", 51, "both", (32, 64))
    container = container_of(matrix)
    assert container.error > 0 and container_of(matrix.plain).error == 0
    assert relative_error(container.weight(), matrix) < 1e-3


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "BertForMaskedLM"])
def test_saved_and_loaded(architecture: str, tmp_path: Path) -> None:
    """save_pretrained and from_pretrained of a model of mixed matrices: the same logits, and few signs in the files."""
    family = "llama" if architecture.startswith("Llama") else "bert"
    model = families.build(architecture, family)
    views = matrices(model)
    mixing = online_mixing(views, Sites())
    mixing[views[0].name], mixing[views[1].name] = "none", "input"
    rounder, specs = codec("half_pyramid"), {}
    for view in views:
        signs = view_signs(view, mixing[view.name], 0)
        linear = model.get_submodule(view.module)
        target = mix_weight(linear.weight, signs, torch.float32)
        matrix = rounder.quantize(target, rounder.spec(26)).mixed(signs)
        model.set_submodule(view.module, PackedLinear.from_matrix(linear, matrix))
        specs[view.module] = matrix.spec
    ignore = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    model.config.quantization_config = QuantizationConfig.from_specs(specs, ignore, 3.5).to_dict()
    model.save_pretrained(tmp_path)
    again = getattr(transformers, architecture).from_pretrained(tmp_path)
    for view in views:
        assert again.get_submodule(view.module).spec.mixing == mixing[view.name]
    ids = families.token_ids()
    assert torch.equal(families.logits(again, ids), families.logits(model, ids))
    plain = families.logits(again.dequantize(), ids)
    torch.testing.assert_close(plain, families.logits(model, ids), rtol=1e-3, atol=1e-3)
