"""A packed module computes what an nn.Linear with the decoded weight computes, and stores only the payload."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from compress.codecs import QuantizedMatrix, codec
from compress.errors import ArtifactError, CodecError
from compress.quantization.modules import PackedLinear, packed_modules, prepare_packed, unpack

PYRAMID = codec("pyramid")


def quantized(rows: int, columns: int) -> QuantizedMatrix:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return PYRAMID.quantize(weight, PYRAMID.spec(51))


def packed(bias: bool = True, rows: int = 24, columns: int = 40) -> PackedLinear:
    return PackedLinear.from_matrix(nn.Linear(columns, rows, bias=bias), quantized(rows, columns))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_forward(bias: bool, dtype: torch.dtype) -> None:
    module = packed(bias).to(dtype)
    x = torch.randn(2, 3, 40, dtype=dtype)
    weight = quantized(24, 40).dequantize(torch.float32).to(dtype)
    expected = functional.linear(x, weight, module.bias)
    assert torch.equal(module(x), expected)
    assert torch.equal(module(x), expected)  # from the kept weight


@pytest.mark.parametrize("rows", [1, 3, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_forward_with_packed_weights(rows: int, dtype: torch.dtype) -> None:
    """The same map where the codec multiplies with packed weights: prepared once, and again for another payload."""
    rounder = codec("half_pyramid")
    matrices = [rounder.quantize(torch.randn(24, 44), rounder.spec(26)) for _ in range(2)]
    module = PackedLinear.from_matrix(nn.Linear(44, 24), matrices[0]).to(dtype)
    x = torch.randn(rows, 1, 44, dtype=dtype)
    for matrix in matrices:
        module.load_state_dict({"weight": matrix.payload(), "bias": module.bias})
        expected = functional.linear(x, matrix.dequantize().to(dtype), module.bias)
        tolerance = 1e-5 if dtype != torch.bfloat16 else 3e-2
        with torch.no_grad():
            for each in (module, module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
                torch.testing.assert_close(each(x), expected, rtol=tolerance, atol=tolerance * 4)
    assert set(module.state_dict()) == {"weight", "bias"}


def test_gradient_with_packed_weights() -> None:
    rounder = codec("half_pyramid")
    matrix = rounder.quantize(torch.randn(24, 40), rounder.spec(26))
    module = PackedLinear.from_matrix(nn.Linear(40, 24), matrix)
    x = torch.randn(2, 40, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, matrix.dequantize().sum(0).expand(2, 40))


def test_damaged_codes_are_refused() -> None:
    rounder = codec("half_pyramid")
    matrix = rounder.quantize(torch.randn(8, 64), rounder.spec(26))
    for name in matrix.tensors:
        if name.startswith("plane"):
            matrix.tensors[name].fill_(255)
    module = PackedLinear.from_matrix(nn.Linear(64, 8), matrix)
    with pytest.raises(CodecError, match="outside its codebook"):
        module(torch.randn(1, 64))


def test_state_is_payload_and_bias() -> None:
    module = packed()
    module(torch.randn(1, 40))
    state = module.state_dict()
    assert set(state) == {"weight", "bias"}
    assert state["weight"].dtype == torch.int8
    assert state["weight"].shape == (quantized(24, 40).bits // 8,)
    assert set(packed(bias=False).state_dict()) == {"weight"}


def test_dtype_changes_do_not_touch_the_payload() -> None:
    module = packed()
    payload = module.weight.clone()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        module.to(dtype)
        assert torch.equal(module.weight, payload)
        assert module(torch.zeros(1, 40, dtype=dtype)).dtype == dtype


def test_quantized_gives_back_the_matrix() -> None:
    matrix, found = quantized(24, 40), packed().quantized()
    assert found.spec == matrix.spec
    assert torch.equal(found.payload(), matrix.payload())


def test_loading_a_state_replaces_the_kept_weight() -> None:
    module = packed()
    x = torch.randn(1, 40)
    before = module(x)
    other = PYRAMID.quantize(torch.randn(24, 40), PYRAMID.spec(51))
    module.load_state_dict({"weight": other.payload(), "bias": module.bias})
    assert not torch.equal(module(x), before)
    assert torch.equal(module(x), functional.linear(x, other.dequantize(), module.bias))


def test_wrong_payload_length() -> None:
    module = PackedLinear(PYRAMID.spec(51), 24, 40, torch.zeros(5, dtype=torch.int8))
    with pytest.raises(ArtifactError, match="24 x 40"):
        module(torch.zeros(1, 40))


def test_gradient_reaches_the_activations_only() -> None:
    module = packed()
    x = torch.randn(2, 40, requires_grad=True)
    module(x).sum().backward()
    expected = quantized(24, 40).dequantize().sum(0).expand(2, 40)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)


def test_deepcopy() -> None:
    module = packed()
    x = torch.randn(1, 40)
    assert torch.equal(copy.deepcopy(module)(x), module(x))


def test_prepare_and_unpack() -> None:
    model = nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 8))
    prepare_packed(model, {"0": PYRAMID.spec(51)})
    assert list(packed_modules(model)) == ["0"]
    model.load_state_dict({**model.state_dict(), "0.weight": quantized(24, 40).payload()})
    x = torch.randn(3, 40)
    expected = model(x)
    assert unpack(model, torch.float32) is model
    assert isinstance(model[0], nn.Linear)
    assert torch.equal(model(x), expected)
    assert not packed_modules(model)
    with pytest.raises(TypeError, match="not a linear map"):
        prepare_packed(nn.Sequential(nn.ReLU()), {"0": PYRAMID.spec(51)})
