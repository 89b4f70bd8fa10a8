"""Each architecture of `tests.architectures.TABLE` from a plan to an artifact that runs: every cell of the table."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from torch import Tensor

import compress
from compress.cli.main import main
from compress.errors import CompressError
from compress.formats.native import Artifact
from compress.modeling.structure import as_matrix, matrices
from compress.modeling.tested import TESTED
from compress.quantization.modules import packed_modules
from tests import families
from tests.architectures import TABLE, Architecture, inputs, logits, rows

EIGHT, FOUR = "integer:group=16", 4.9
DOCS = Path(__file__).parents[1] / "docs" / "models.md"
each = pytest.mark.parametrize("made", TABLE, indirect=True, ids=[one.title for one in TABLE])


@dataclass(frozen=True)
class Made:
    """An architecture's model, its folder, and the artifact of 8 bits that the command made of it."""

    architecture: Architecture
    model: transformers.PreTrainedModel
    folder: Path
    artifact: Path
    printed: str


_MADE: dict[str, Made] = {}


@pytest.fixture
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    architecture: Architecture = request.param
    if architecture.title not in _MADE:
        place = tmp_path_factory.mktemp("architecture")
        model = architecture.build()
        model.save_pretrained(place / "model")
        call = ["quantize", str(place / "model"), "--bits", "8.9", "--codec", EIGHT, "--out", str(place / "q")]
        result = CliRunner().invoke(main, call)
        assert result.exit_code == 0, result.output
        _MADE[architecture.title] = Made(architecture, model, place / "model", place / "q", result.output)
    return _MADE[architecture.title]


def decoded(made: Made) -> transformers.PreTrainedModel:
    """The original with its matrices as the artifact has them, put there one by one."""
    model, artifact = copy.deepcopy(made.model), Artifact(made.artifact)
    with torch.no_grad():
        for name, view in artifact.modules.items():
            as_matrix(model.get_parameter(view.parameter), view).copy_(
                artifact.matrix(name).dequantize().view(as_matrix(model.get_parameter(view.parameter), view).shape)
            )
    return model


@each
def test_the_plan_has_every_matrix(made: Made) -> None:
    result = CliRunner().invoke(main, ["plan", "quantize", str(made.folder), "--bits", "3.5"])
    assert result.exit_code == 0, result.output
    assert len(matrices(made.model)) == made.architecture.maps
    assert f"{made.architecture.maps} matrices" in result.output
    assert "not among the architectures" not in result.output
    assert made.model.config.model_type in TESTED


@each
def test_the_artifact_runs_as_its_decoded_matrices(made: Made) -> None:
    loaded, batch = compress.load(made.artifact), inputs(made.model)
    found, original = logits(loaded, batch), logits(made.model, batch)
    torch.testing.assert_close(found, logits(decoded(made), batch), rtol=1e-4, atol=1e-5)
    assert (found - original).norm() <= 0.02 * original.norm()
    assert sum(len(view.name) > 0 for view in Artifact(made.artifact).modules.values()) == made.architecture.maps
    bytes_ = sum(tensor.nbytes for tensor in loaded.state_dict().values() if tensor.dtype == torch.int8)
    weights = sum(view.weights for view in matrices(made.model))
    assert 8.5 < 8 * bytes_ / weights <= 8.9 + 1.5 * (weights < 4000)


@each
def test_it_is_quantized_in_memory_to_the_same(made: Made, tmp_path: Path) -> None:
    model = compress.quantize(copy.deepcopy(made.model), bits=8.9, codec=EIGHT)
    batch, expected = inputs(made.model), compress.load(made.artifact).state_dict()
    assert isinstance(model, transformers.PreTrainedModel)
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    model.save_pretrained(tmp_path / "again")
    again = compress.load(tmp_path / "again")
    assert torch.equal(logits(again, batch), logits(model, batch))
    plain = again.dequantize()
    assert not packed_modules(plain)
    plain.save_pretrained(tmp_path / "plain")
    ordinary = type(made.model).from_pretrained(tmp_path / "plain").eval()
    torch.testing.assert_close(logits(ordinary, batch), logits(model, batch), rtol=1e-4, atol=1e-5)


@each
def test_it_writes_or_classifies_as_its_decoded_matrices(made: Made) -> None:
    loaded, other, batch = compress.load(made.artifact), decoded(made), inputs(made.model)
    if not made.model.can_generate():
        assert torch.equal(logits(loaded, batch).argmax(-1), logits(other, batch).argmax(-1))
        return
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    written = [model.generate(**batch, **options) for model in (loaded, other)]
    assert torch.equal(*written)
    assert written[0].shape[1] >= 6


@each
def test_data_make_it_better(made: Made) -> None:
    data: Any = torch.randint(3, 90, (48, 24), generator=torch.Generator().manual_seed(3))
    if made.model.main_input_name != "input_ids":
        data = [inputs(made.model, 8, seed) for seed in range(2, 8)]
    if made.architecture.calibrated is not True:
        with pytest.raises(CompressError, match="several"):
            compress.quantize(copy.deepcopy(made.model), bits=FOUR, codec=EIGHT, data=data)
        return
    batch = inputs(made.model, rows=16, seed=9)
    original = logits(made.model, batch)
    errors = []
    for given in (None, data):
        model = compress.quantize(copy.deepcopy(made.model), bits=FOUR, codec=EIGHT, data=given)
        assert isinstance(model, transformers.PreTrainedModel)
        errors.append(divergence(original, logits(model, batch)))
    assert errors[1] < errors[0]


def divergence(original: Tensor, found: Tensor) -> float:
    log_p, log_q = original.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


IN_EXPORTERS = ("Llama", "Mistral", "Qwen 2", "Qwen 3", "GPT-2", "OPT", "BERT", "ViT", "ResNet", "ConvNeXt", "LLaVA")
"""Whose exports `tests/exporters` looks at more closely."""
OTHERS = [one for one in TABLE if one.title not in IN_EXPORTERS]


@pytest.mark.parametrize("made", OTHERS, indirect=True, ids=[one.title for one in OTHERS])
def test_export(made: Made, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    if made.architecture.onnx is True:
        report = compress.export(compress.load(made.artifact), tmp_path / "onnx", to="onnx")
        assert report.max_relative_error <= 1e-5
        return
    with pytest.raises(CompressError) as caught:
        compress.export(compress.load(made.artifact), tmp_path / "onnx", to="onnx")
    assert caught.value.remedy
    assert not (tmp_path / "onnx").exists()


def test_the_page_says_what_is_tested() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert "\n".join(rows()) in text, "python -c 'from tests.architectures import rows; print(*rows(), sep=chr(10))'"


def test_an_architecture_of_no_test_is_taken_by_its_structure(tmp_path: Path) -> None:
    families.save(families.build("Starcoder2ForCausalLM", "starcoder2"), tmp_path / "m")
    result = CliRunner().invoke(main, ["plan", "quantize", str(tmp_path / "m"), "--bits", "3.5"])
    assert result.exit_code == 0, result.output
    assert "'starcoder2' is not among the architectures that are tested" in " ".join(result.output.split())
    assert "2 blocks 'model.layers'" in " ".join(result.output.split())


def test_towers_are_left_alone_unless_asked_for(tmp_path: Path) -> None:
    llava = next(one for one in TABLE if one.title == "LLaVA")
    llava.build().save_pretrained(tmp_path / "m")
    said = {}
    for words in ("", "--towers"):
        call = [
            "quantize",
            str(tmp_path / "m"),
            "--bits",
            "8.9",
            "--codec",
            EIGHT,
            "--out",
            str(tmp_path / f"q{words}"),
        ]
        result = CliRunner().invoke(main, [*call, *words.split()])
        assert result.exit_code == 0, result.output
        said[words] = Artifact(tmp_path / f"q{words}")
    assert all("language_model" in name for name in said[""].modules)
    assert len(said["--towers"].modules) == 14 + 12
    plan = CliRunner().invoke(main, ["plan", "quantize", str(tmp_path / "m"), "--bits", "8.9", "--codec", EIGHT])
    assert "'model.vision_tower.encoder.layers'" in " ".join(plan.output.split())
    assert "--towers asks for it" in " ".join(plan.output.split())
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ids = torch.cat([torch.full((1, 16), 95), torch.arange(3, 12).unsqueeze(0)], 1)
    original = logits(llava.build(), {"input_ids": ids, "pixel_values": pixels})
    found = logits(compress.load(tmp_path / "q--towers"), {"input_ids": ids, "pixel_values": pixels})
    assert 0 < (found - original).norm() <= 0.03 * original.norm()
