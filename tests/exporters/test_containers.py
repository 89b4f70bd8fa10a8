"""Containers against an unpacker written from the operator's documentation, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.codecs import codec
from compress.codecs.base import CodecSpec, QuantizedMatrix
from compress.exporters.containers import Container, container_of


class Matrix(QuantizedMatrix):
    """A matrix of given integers and scales, whatever codec could have made it."""

    def __init__(self, integers: Tensor, scales: Tensor, columns: int) -> None:
        super().__init__(CodecSpec("any", 0, integers.shape[1] // scales.shape[1]), (len(integers), columns), {})
        self.factors = integers, scales

    def integers(self) -> tuple[Tensor, Tensor]:
        return self.factors

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return codec("pyramid").decode(self, dtype)


def weight_of(container: Container) -> Tensor:
    """W [rows, columns], one weight at a time: its bits are cut out of the block's little-endian bit stream."""
    mask, zero = (1 << container.bits) - 1, 1 << container.bits - 1
    weight = torch.empty(container.rows, container.columns)
    for row in range(container.rows):
        for column in range(container.columns):
            block, place = divmod(column, container.block)
            stream = int.from_bytes(bytes(container.codes[row, block].tolist()), "little")
            code = stream >> place * container.bits & mask
            weight[row, column] = container.scales[row, block] * (code - zero)
    return weight


def random_matrix(low: int, high: int, group: int, groups: int, columns: int) -> Matrix:
    generator = torch.Generator().manual_seed(high)
    integers = torch.randint(low, high + 1, (5, group * groups), generator=generator, dtype=torch.int8)
    integers[0, :2] = torch.tensor([low, high])
    return Matrix(integers, torch.rand(5, groups, generator=generator) + 0.1, columns)


@pytest.mark.parametrize(
    ("low", "high", "group", "groups", "columns", "bits", "block"),
    [
        (-8, 7, 16, 3, 48, 4, 16),
        (-8, 7, 16, 3, 35, 4, 16),
        (-8, 8, 16, 2, 32, 8, 16),
        (-9, 7, 16, 2, 32, 8, 16),
        (-128, 127, 32, 2, 41, 8, 32),
        (-7, 7, 48, 2, 70, 4, 16),
        (-7, 7, 512, 1, 300, 4, 256),
    ],
)
def test_container_is_exact_and_as_small_as_can_be(
    low: int, high: int, group: int, groups: int, columns: int, bits: int, block: int
) -> None:
    matrix = random_matrix(low, high, group, groups, columns)
    container = container_of(matrix)
    assert (container.bits, container.block) == (bits, block)
    assert torch.equal(weight_of(container), matrix.dequantize())
    blocks = -(-columns // block)
    assert container.stored_bits == 5 * blocks * (block * bits + 32)


def test_container_of_a_pyramid() -> None:
    rounder = codec("pyramid")
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    matrix = rounder.quantize(weight, rounder.spec(52))
    container = container_of(matrix)
    assert container.bits == 4
    assert torch.equal(weight_of(container), matrix.dequantize())


@pytest.mark.parametrize("columns", [64, 50])
def test_groups_that_no_block_divides_are_rounded_to_8_bits(columns: int) -> None:
    matrix = random_matrix(-40, 40, 8, 8, columns)
    container = container_of(matrix)
    weight, exact = weight_of(container).double(), matrix.dequantize().double()
    assert (container.bits, container.block, container.kind) == (8, 32, "8 bit (rounded)")
    assert torch.equal(container.weight().double(), weight)
    error = float((weight - exact).square().sum() / exact.square().sum())
    assert container.error == pytest.approx(error, rel=1e-9) and 0 < error < 1e-4
    steps = container.scales.repeat_interleave(32, 1)[:, :columns].double()
    assert float(((weight - exact).abs() / steps).max()) <= 0.5 + 1e-4


def test_containers_read_as_the_operator_reads_them() -> None:
    for low, high, group in ((-8, 7, 16), (-100, 100, 32)):
        container = container_of(random_matrix(low, high, group, 2, 2 * group - 3))
        assert torch.equal(container.weight(), weight_of(container)) and container.error == 0
