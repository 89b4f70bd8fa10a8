"""Containers against an unpacker written from the operator's documentation, bit for bit."""

from __future__ import annotations

from pathlib import Path

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
    """W [rows, columns], one weight at a time: its bits are cut out of the block's little-endian bit stream, its zero
    point out of the row's."""
    mask, zero = (1 << container.bits) - 1, 1 << container.bits - 1
    weight = torch.empty(container.rows, container.columns)
    for row in range(container.rows):
        for column in range(container.columns):
            block, place = divmod(column, container.block)
            if container.zeros is not None:
                zeros = int.from_bytes(bytes(container.zeros[row].tolist()), "little")
                zero = zeros >> block * container.bits & mask
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


@pytest.mark.parametrize(
    ("options", "bits", "kind", "block"),
    [
        ({"group": 64, "symmetric": True}, 4, "4 bit", 64),
        ({"group": 64}, 2, "4 bit", 64),
        ({"group": 32}, 3, "4 bit", 32),
        ({"group": 32}, 4, "4 bit", 32),
        ({"group": 48}, 4, "4 bit", 16),
        ({"group": 16}, 5, "8 bit", 16),
        ({"group": 16, "symmetric": True}, 8, "8 bit", 16),
        ({"group": 0}, 4, "4 bit", 64),
        ({"group": 1024, "symmetric": True}, 7, "8 bit", 64),
    ],
    ids=str,
)
def test_group_integers_are_exact(options: dict[str, int | bool], bits: int, kind: str, block: int) -> None:
    """Weights of one sign in some rows have zero points at the ends; 172 columns are no whole number of groups."""
    rounder = codec("integer", **options)
    weight = torch.randn(6, 172, generator=torch.Generator().manual_seed(bits))
    weight[0], weight[1] = weight[0].abs(), -weight[1].abs()
    matrix = rounder.quantize(weight, rounder.spec(bits))
    container = container_of(matrix)
    assert (container.kind, container.block) == (kind, block)
    assert (container.zeros is not None) == (bits == 4 and "symmetric" not in options)
    assert torch.equal(weight_of(container), matrix.dequantize())
    assert torch.equal(container.weight(), matrix.dequantize())
    assert f"onnx int{container.bits}" in rounder.containers(matrix.spec)
    blocks = -(-172 // block)
    points = 0 if container.zeros is None else 8 * -(-blocks // 2)
    assert container.stored_bits == 6 * (blocks * (block * container.bits + 32) + points)


def test_other_groups_of_integers_are_rounded() -> None:
    rounder = codec("integer", group=24)
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    container = container_of(rounder.quantize(weight, rounder.spec(4)))
    assert container.kind == "8 bit (rounded)" and rounder.containers(rounder.spec(4)) == ()


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    ("options", "bits"),
    [({"group": 16}, 4), ({"group": 64, "symmetric": True}, 3), ({"group": 32}, 6)],
    ids=["4 bit with zero points", "4 bit", "8 bit"],
)
def test_the_operator_multiplies_by_what_was_rounded(
    options: dict[str, int | bool], bits: int, bias: bool, tmp_path: Path
) -> None:
    """In ONNX Runtime, from the module that exports itself; five blocks of 16 have zero points in three bytes."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    from compress.exporters.onnx_modules import PackedProduct

    generator = torch.Generator().manual_seed(1)
    rounder, weight = codec("integer", **options), torch.randn(12, 80, generator=generator)
    weight[:3] += 1
    matrix = rounder.quantize(weight, rounder.spec(bits))
    offset = torch.randn(12, generator=generator) if bias else None
    x, file = torch.randn(3, 80, generator=generator), tmp_path / "product.onnx"
    program = torch.onnx.export(PackedProduct(container_of(matrix), offset).eval(), (x,), dynamo=True, verbose=False)
    assert program is not None
    program.save(file)
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]).double()
    expected = x.double() @ matrix.dequantize(torch.float64).T
    expected = expected if offset is None else expected + offset.double()
    assert float((found - expected).abs().max()) < 1e-5


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
