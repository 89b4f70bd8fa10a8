"""Quantized convolutions in a file: its bytes, read by hand, against the codes; its function against float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from compress.codecs import codec
from compress.codecs.base import QuantizedMatrix
from compress.exporters.blocked import blocked_of, store_four_bits
from compress.exporters.onnx_modules import PackedKernel
from compress.quantization.modules import PackedConvolution

CASES = [
    ("integer", {"group": 16}, 4, "4 bit", 16, "UINT4"),
    ("integer", {"group": 24, "symmetric": True}, 3, "4 bit", 24, "INT4"),
    ("integer", {"group": 0}, 4, "4 bit", 45, "UINT4"),
    ("integer", {"group": 32}, 6, "8 bit", 32, "INT8"),
    ("half_pyramid", {}, 32, "8 bit", 8, "INT8"),
    ("nf4", {"block": 32}, 4, "8 bit (rounded)", 32, "INT8"),
]
IDS = [f"{name} {options}" for name, options, *_ in CASES]


def matrix_of(name: str, options: dict[str, Any], width: int) -> QuantizedMatrix:
    """6 rows of 45 weights, 5 channels by 3 x 3, some of one sign."""
    weight = torch.randn(6, 45, generator=torch.Generator().manual_seed(0))
    weight[0] = weight[0].abs()
    rounder = codec(name, **options)
    return rounder.quantize(weight, rounder.spec(width))


@pytest.mark.parametrize(("name", "options", "width", "kind", "block", "stored"), CASES, ids=IDS)
def test_codes_are_exact_and_counted(
    name: str, options: dict[str, Any], width: int, kind: str, block: int, stored: str
) -> None:
    matrix = matrix_of(name, options, width)
    blocked = blocked_of(matrix)
    assert (blocked.kind, blocked.block, (blocked.rows, blocked.columns)) == (kind, block, (6, 45))
    weight = torch.empty(6, 45)
    for row in range(6):
        for column in range(45):
            zero = 0 if blocked.zeros is None else int(blocked.zeros[row, column // block])
            code = int(blocked.codes[row, column]) - zero
            weight[row, column] = blocked.scales[row, column // block] * code
    assert torch.equal(blocked.weight(), weight)
    exact = matrix.dequantize()
    if blocked.error == 0:
        assert torch.equal(weight, exact)
    else:
        difference = (weight - exact).double().square().sum() / exact.double().square().sum()
        assert blocked.error == pytest.approx(float(difference), rel=1e-6) and 0 < blocked.error < 1e-4


def by_hand(stored: onnx.TensorProto) -> Tensor:
    """The integers of an initializer from its bytes: of 4 bits the low half of a byte comes first."""
    raw, kinds = stored.raw_data, onnx.TensorProto
    if stored.data_type == kinds.INT8:
        numbers = [byte - 256 * (byte > 127) for byte in raw]
    else:
        halves = [half for byte in raw for half in (byte & 15, byte >> 4)][: int(numpy.prod(stored.dims))]
        numbers = [half - 16 * (half > 7 and stored.data_type == kinds.INT4) for half in halves]
    return torch.tensor(numbers).view(*stored.dims)


class Beside(nn.Module):
    """All cases side by side, so that they are traced once."""

    def __init__(self, plain: nn.Conv2d) -> None:
        super().__init__()
        self.cases = nn.ModuleList()
        for name, options, width, *_ in CASES:
            matrix = matrix_of(name, options, width)
            packed = PackedConvolution(copy.deepcopy(plain), matrix.spec, matrix.payload())
            self.cases.append(PackedKernel(blocked_of(matrix), packed))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(case(x) for case in self.cases)


def test_the_file_is_small_and_computes_the_convolutions(tmp_path: Path) -> None:
    plain = nn.Conv2d(5, 6, 3, stride=2, padding=1, dilation=2)
    file, x = tmp_path / "model.onnx", torch.randn(3, 5, 11, 9, generator=torch.Generator().manual_seed(1))
    program = torch.onnx.export(Beside(plain).eval(), (x,), dynamo=True, opset_version=21, verbose=False)
    assert program is not None
    store_four_bits(program.model.graph)
    program.save(file)
    onnx.checker.check_model(file, full_check=True)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})

    graph = onnx.load(file).graph
    initializers = {one.name: one for one in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    assert {node.op_type for node in graph.node} == {"DequantizeLinear", "Reshape", "Conv"}
    for (name, options, width, kind, _, stored), node, output in zip(CASES, nodes, found, strict=True):
        blocked = blocked_of(matrix_of(name, options, width))
        parts = [initializers[part] for part in node.input]
        assert onnx.TensorProto.DataType.Name(parts[0].data_type) == stored
        assert torch.equal(by_hand(parts[0]), blocked.codes.long())
        assert len(parts[0].raw_data) == (270 if "8" in kind else 135)
        assert 8 * sum(len(part.raw_data) for part in parts) == blocked.stored_bits
        weight = blocked.weight().double().view(6, 5, 3, 3)
        assert plain.bias is not None
        expected = nn.functional.conv2d(x.double(), weight, plain.bias.detach().double(), 2, 1, 2)
        assert float((torch.from_numpy(output).double() - expected).abs().max() / expected.abs().max()) < 1e-5
