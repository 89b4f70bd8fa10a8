"""Row scales: the documented numbers, the nearest code."""

from __future__ import annotations

import struct
from decimal import Decimal, localcontext

import pytest
import torch

from compress.codecs.rows import HEADROOM, TOP, factors, initial_codes, row_rms, row_scales

FRACTIONS = struct.unpack(
    ">16I",
    bytes.fromhex(
        "3f800000 3f75257d 3f6ac0c7 3f60ccdf 3f5744fd 3f4e248c 3f45672a 3f3d08a4"
        "3f3504f3 3f2d583f 3f25fed7 3f1ef532 3f1837f0 3f11c3d3 3f0b95c2 3f05aac3"
    ),
)
"""As printed in docs/formats.md."""


def test_factors_are_the_documented_ones() -> None:
    assert float(factors()[0]) == 0.0
    for q in range(1, 256):
        fraction = struct.unpack(">f", struct.pack(">I", FRACTIONS[(255 - q) % 16]))[0]
        assert float(factors()[q]) == fraction * 2.0 ** -((255 - q) // 16)


def test_factors_are_the_nearest_float32_by_decimal_arithmetic() -> None:
    with localcontext() as context:
        context.prec = 40
        for j, bits in enumerate(FRACTIONS):
            exact = Decimal(2) ** (Decimal(-j) / 16)
            near = [Decimal(struct.unpack(">f", struct.pack(">I", bits + step))[0]) for step in (-1, 0, 1)]
            assert min(near, key=lambda value: abs(value - exact)) == near[1]


def test_initial_codes_are_the_nearest_in_ratio() -> None:
    weight = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    weight *= torch.exp2(-torch.rand(300, 1, generator=torch.Generator().manual_seed(1)) * 14)
    scale, codes = initial_codes(weight)
    ratio = row_scales(scale, codes).double() / weight.double().square().mean(1).sqrt()
    assert ratio.log2().abs().max() <= 1 / 32 + 1e-6
    assert int(codes.max()) == TOP - HEADROOM


@pytest.mark.parametrize("factor", [1e-38, 1.0, 1e35])
def test_rms_neither_overflows_nor_underflows(factor: float) -> None:
    assert row_rms(torch.full((2, 10), factor)).tolist() == pytest.approx([factor] * 2, rel=1e-6)


def test_no_rows_no_columns_no_weight() -> None:
    assert initial_codes(torch.zeros(0, 5))[1].tolist() == []
    assert initial_codes(torch.zeros(3, 0))[1].tolist() == [0, 0, 0]
    scale, codes = initial_codes(torch.zeros(2, 4))
    assert float(scale) == 0.0 and row_scales(scale, codes).tolist() == [0.0, 0.0]
