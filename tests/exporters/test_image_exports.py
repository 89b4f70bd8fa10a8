"""Image models, and the language part of a model with a tower, in ONNX Runtime against torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from tiny_exports import Exported, backbone, vit
from torch import Tensor
from transformers import PreTrainedModel, ViTImageProcessor
from transformers.models.resnet.modeling_resnet import ResNetBackbone

from compress.errors import ExportError
from compress.evaluation.generate import OnnxDecoder, generate_greedy
from compress.exporters.images import image_size_of
from compress.exporters.interface import interface_of
from compress.modeling.loading import parameter_count
from compress.quantization.modules import PackedConvolution, PackedMatrix, packed_modules

Get = Callable[[str], Exported]
TRIED = [("vit", 1, (16, 16)), ("vit", 5, (16, 16)), ("resnet", 5, (40, 33)), ("backbone", 4, (65, 32))]


@torch.no_grad()
def both(case: Exported, images: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of ONNX Runtime and of torch."""
    session = onnxruntime.InferenceSession(case.folder / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"pixel_values": images.numpy()})
    return torch.from_numpy(found), case.model(pixel_values=images)[session.get_outputs()[0].name]


@pytest.mark.parametrize(("name", "count", "size"), TRIED)
def test_outputs_are_those_of_torch(exported: Get, name: str, count: int, size: tuple[int, int]) -> None:
    """In batches, and for convolutions in sizes, that the export was not verified with."""
    images = torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(2))
    found, expected = both(exported(name), images)
    assert found.shape == expected.shape
    report = exported(name).report
    # nf4 is rounded once more
    tolerance = 1e-5 if report.rounding_error == 0 else 0.02
    assert float((found - expected).abs().max() / expected.abs().max()) <= tolerance
    assert (report.kind, set(report.errors)) == ("image", {"one image", "batch 3"})
    assert report.max_relative_error <= 2e-6


def test_names_and_axes(exported: Get) -> None:
    found = {}
    for name in ("vit", "resnet", "backbone"):
        graph = onnx.load(exported(name).folder / "model.onnx").graph
        for value in (*graph.input, *graph.output):
            found[name, value.name] = [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
    assert found == {
        ("vit", "pixel_values"): ["batch", 3, 16, 16],
        ("vit", "logits"): ["batch", 5],
        ("resnet", "pixel_values"): ["batch", 3, "height", "width"],
        ("resnet", "logits"): ["batch", 5],
        ("backbone", "pixel_values"): ["batch", 3, "height", "width"],
        ("backbone", "last_hidden_state"): ["batch", 16, "rows", "columns"],
    }


def test_convolutions_stay_small_in_the_file(exported: Get) -> None:
    """Half a byte or one for a weight, and a scale for a block of 16 or a shorter row; integers of 2 bits fit into 4
    without zero points."""
    case = exported("resnet")
    graph = onnx.load(case.folder / "model.onnx").graph
    found = {tuple(one.dims): len(one.raw_data) for one in graph.initializer}
    stored = weights = 0
    for module in packed_modules(case.model).values():
        assert isinstance(module, PackedConvolution)
        rows, columns = module.quantized().shape
        bits, blocks = 4 if module.spec.width <= 4 else 8, -(-columns // 16)
        assert found[rows, columns] == rows * columns * bits // 8
        stored += rows * (columns * bits + blocks * 32)
        weights += rows * columns
    assert weights == 16 * (8 + 72 + 144) and case.report.matrices == {"4 bit": 1, "8 bit": 2}
    assert case.report.container_bits_per_weight == pytest.approx(stored / weights)
    large = [one for one in graph.initializer if one.data_type == onnx.TensorProto.FLOAT and len(one.dims) == 4]
    assert [list(one.dims) for one in large] == [[8, 3, 7, 7]]
    assert (case.report.opset, exported("vit").report.opset) == (21, 20)


@pytest.mark.parametrize(("name", "with_processor"), [("vit", True), ("resnet", False)])
def test_program_of_the_card_runs(
    exported: Get,
    name: str,
    with_processor: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = exported(name)
    card = (case.folder / "README.md").read_text()
    program = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert program is not None and "# An image model for ONNX Runtime" in card
    assert ("AutoImageProcessor" in program[1]) == with_processor
    assert ("preprocessor_config.json" in case.report.files) == with_processor
    monkeypatch.chdir(case.folder)
    exec(program[1], {})
    assert capsys.readouterr().out.strip() == "(1, 5)"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"size": {"height": 24, "width": 32}}, (24, 32)),
        ({"size": {"shortest_edge": 32}}, None),
        ({"do_resize": False}, None),
    ],
    ids=["one size", "one edge", "none"],
)
def test_the_size_is_what_the_processor_makes(
    settings: dict[str, object], expected: tuple[int, int] | None, tmp_path: Path
) -> None:
    """Where it makes none, that of the config, and any where the config has none."""
    from transformers import BitImageProcessor

    processor = BitImageProcessor if "shortest_edge" in str(settings) else ViTImageProcessor
    processor(**settings, **({"do_center_crop": False} if processor is BitImageProcessor else {})).save_pretrained(
        tmp_path
    )
    assert image_size_of(backbone(), tmp_path) == expected
    assert image_size_of(vit(), tmp_path) == (expected or (16, 16))


def test_a_size_that_is_asked_for_or_refused() -> None:
    interface = interface_of(backbone(), image_size=(32, 48))
    assert interface.example()[0].shape == (2, 3, 32, 48)
    assert list(interface.output_shapes.values()) == [["batch", 16, 8, 12]]
    with pytest.raises(ExportError, match=r"does not run on pixel_values \[1, 3, 20, 16\]"):
        interface_of(vit(), image_size=(20, 16))


def test_outputs_that_are_neither_classes_nor_hidden_states() -> None:
    model: PreTrainedModel = ResNetBackbone(backbone().config).eval()
    with pytest.raises(ExportError, match="returns feature_maps"):
        interface_of(model)


def test_one_that_is_rounded_says_so_and_is_as_before(exported: Get) -> None:
    """Its errors are of the weights in the file."""
    case = exported("backbone")
    assert case.report.matrices == {"8 bit (rounded)": 3}
    assert 0 < case.report.rounding_error < 1e-4 and case.report.max_relative_error <= 2e-6
    assert all(isinstance(module, PackedConvolution) for module in packed_modules(case.model).values())


def test_a_language_part_says_that_it_is_one(exported: Get) -> None:
    """Its parameters are counted without the tower; it goes on as the whole model does, given tokens alone."""
    case = exported("llava")
    assert "language part" in case.report.part and "language part" in (case.folder / "README.md").read_text()
    assert json.loads((case.folder / "report.json").read_text())["part"] == case.report.part
    assert exported("vit").report.part == "the whole model"
    language = case.model.model.language_model
    packed = packed_modules(language).values()
    # the embedding is the head
    kept = sum(math.prod(module.quantized().shape) for module in packed if isinstance(module, PackedMatrix))
    assert case.report.parameters == parameter_count(language) + kept
    assert sum(case.report.matrices.values()) == len(packed) == 7 and len(packed_modules(case.model)) > 7
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(OnnxDecoder(case.folder).generate(ids, 20), generate_greedy(case.model, ids, 20))
