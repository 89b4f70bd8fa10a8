"""NF4, FP4 and int8 against bitsandbytes' own functions on the CPU, bit for bit, on random and on awkward matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compress.codecs import Codec, CodecSpec, QuantizedMatrix, codec
from compress.codecs.normal_float.tables import table
from tests.codecs.payloads import normal

functional = pytest.importorskip("bitsandbytes.functional")


def one_large() -> Tensor:
    weight = 0.01 * normal(16, 96)
    weight[3, 17] = 1e4
    return weight


def signed_zeros() -> Tensor:
    weight = normal(4, 64)
    weight[:, ::3] = -0.0
    weight[:, 1::3] = 1e-9
    return weight


def ties(name: str = "nf4") -> Tensor:
    """Midpoints of neighbours in the table, and one step of float32 to either side, under a scale of 1."""
    middle = table(name).bounds
    around = torch.cat([middle, torch.nextafter(middle, middle + 1), torch.nextafter(middle, middle - 1)])
    weight = torch.zeros(4, 64)
    weight[0, : around.numel()], weight[0, 63] = around, 1.0
    weight[1] = -weight[0]
    weight[2] = 3.7 * weight[0]
    return weight


MATRICES: dict[str, Tensor] = {
    "random": normal(64, 192),
    "long rows": normal(3, 4096, seed=1),
    "rows across blocks": normal(33, 100, seed=2),
    "odd": normal(7, 33, seed=3),
    "one": torch.tensor([[-2.5]]),
    "zeros": torch.zeros(5, 70),
    "a row of zeros": torch.cat([normal(2, 64), torch.zeros(1, 64), normal(2, 64)]),
    "one large": one_large(),
    "signed zeros": signed_zeros(),
    "ties of nf4": ties("nf4"),
    "ties of fp4": ties("fp4"),
    "tiny": 1e-36 * normal(8, 64),
    "subnormal": 1e-40 * normal(4, 64),
    "huge": normal(8, 64).clamp(-3, 3) * 1e38,
    "heavy tails": normal(64, 64, seed=4) ** 5,
}


def spec_of(rounder: Codec) -> CodecSpec:
    return rounder.spec(rounder.widths()[0])


def theirs(weight: Tensor, name: str, block: int, double: bool = False) -> tuple[Tensor, Any, Tensor]:
    codes, state = functional.quantize_4bit(weight, blocksize=block, quant_type=name, compress_statistics=double)
    return codes.flatten(), state, functional.dequantize_4bit(codes, state)


def test_tables() -> None:
    for name in ("nf4", "fp4"):
        assert torch.equal(table(name).values, functional.get_4bit_type(name, "cpu"))
    assert torch.equal(table("dynamic").values, functional.create_dynamic_map())


@pytest.mark.parametrize("block", [32, 64, 256])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("case", MATRICES)
def test_four_bits(case: str, name: str, block: int) -> None:
    rounder, weight = codec(name, block=block), MATRICES[case]
    matrix = rounder.quantize(weight, spec_of(rounder))
    codes, state, decoded = theirs(weight, name, block)
    assert torch.equal(matrix.tensors["codes"], codes)
    assert torch.equal(matrix.tensors["absmax"], state.absmax)
    assert torch.equal(matrix.dequantize(), decoded)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("case", [case for case in MATRICES if case not in ("huge", "subnormal")])
def test_nested_scales(case: str, name: str) -> None:
    """Codes of weights, the float32 of 256 scales and the mean are the same. The 8-bit codes are the nearest here; the
    library finds them in 65,536 steps of [-1, 1]: its scales are no nearer, and by two steps at most further off. (Of
    subnormal differences it makes codes that are further off than that.)"""
    rounder, weight = codec(name, double=True), MATRICES[case]
    matrix = rounder.quantize(weight, spec_of(rounder))
    codes, state, _ = theirs(weight, name, 64, double=True)
    assert torch.equal(matrix.tensors["codes"], codes)
    assert torch.equal(matrix.tensors["nested_absmax"], state.state2.absmax)
    assert torch.equal(matrix.tensors["nested_offset"], state.offset.view(1))
    tops = matrix.tensors["nested_absmax"].double().repeat_interleave(256)[: state.absmax.numel()]
    exact = theirs(weight, name, 64)[1].absmax.double() - state.offset.double()
    values = table("dynamic").values.double()
    ours, other = (values[found.long()] * tops for found in (matrix.tensors["absmax"], state.absmax))
    excess = (other - exact).abs() - (ours - exact).abs()
    assert bool((excess >= -1e-7 * tops).all()) and bool((excess <= 4 / 65536 * tops).all())


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("case", MATRICES)
def test_nested_scales_are_read_alike(case: str, name: str) -> None:
    """What the library made, in a payload of ours, decodes to what the library decodes it to."""
    rounder, weight = codec(name, double=True), MATRICES[case]
    codes, state, decoded = theirs(weight, name, 64, double=True)
    tensors = {
        "nested_absmax": state.state2.absmax,
        "nested_offset": state.offset.view(1),
        "absmax": state.absmax,
        "codes": codes,
    }
    if bool(torch.isfinite(state.offset)):
        matrix = QuantizedMatrix(spec_of(rounder), (weight.shape[0], weight.shape[1]), tensors)
        assert torch.equal(matrix.dequantize(), decoded)


@pytest.mark.parametrize("case", MATRICES)
def test_int8(case: str) -> None:
    """Bit for bit, but rows below 3.8e-37, where the library casts infinity to a byte. Decoded values are those of its
    product with float activations; `int8_vectorwise_dequant` multiplies in another order: two roundings of 2^-24."""
    rounder, weight = codec("int8"), MATRICES[case]
    matrix = rounder.quantize(weight, rounder.spec(8))
    codes, absmax, _ = functional.int8_vectorwise_quant(weight.clone())
    assert torch.equal(matrix.tensors["absmax"], absmax)
    defined = torch.isfinite(127 / absmax) | (absmax == 0)
    assert torch.equal(matrix.tensors["codes"][defined], codes[defined])
    assert not matrix.tensors["codes"][~defined].any()
    decoded = matrix.dequantize()[defined]
    assert torch.equal(decoded, codes[defined].float() * absmax[defined].unsqueeze(1).mul(1.0 / 127.0))
    if case == "huge":  # whose products of a code and a whole scale are beyond float32
        return
    library = functional.int8_vectorwise_dequant(codes, absmax)[defined]
    torch.testing.assert_close(decoded, library, rtol=2.0**-22, atol=1e-44)
