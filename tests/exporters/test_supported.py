"""What has no ONNX form is refused by name, when it is planned and when it is asked for, and nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

import compress
from compress.errors import ExportError, UsageError
from compress.exporters import export_onnx
from compress.exporters.supported import part_of, require_exportable
from compress.modeling.loading import skeleton
from compress.plan import make_plan
from compress.recipe import make_recipe
from tests import families
from tests.architectures import TABLE, Architecture

OF = {one.title: one for one in TABLE}
REFUSED = {
    "T5": "T5ForConditionalGeneration is an encoder-decoder",
    "Whisper": "WhisperForConditionalGeneration is a speech model",
    "Mixtral": r"MixtralForCausalLM is a mixture of experts \('model.layers.0.mlp.experts'",
    "GPT-OSS": "GptOssForCausalLM is a mixture of experts",
}


def recipe(folder: Path, out: Path, **parts: Any) -> Any:
    return make_recipe({"model": str(folder), "out": str(out), **parts})


@pytest.mark.parametrize("title", REFUSED)
def test_refused_before_anything_is_written(title: str, tmp_path: Path) -> None:
    model = OF[title].build()
    with pytest.raises(ExportError, match=REFUSED[title]) as caught:
        export_onnx(model, tmp_path / "out")
    assert "transformers" in caught.value.remedy
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("title", ["Mixtral", "GPT-OSS"])
def test_quantized_experts_are_refused_alike(title: str, tmp_path: Path) -> None:
    model = compress.quantize(OF[title].build(), bits=8.9, codec="integer:group=16")
    with pytest.raises(ExportError, match=REFUSED[title]):
        export_onnx(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("title", REFUSED)
def test_a_plan_refuses(title: str, tmp_path: Path) -> None:
    """With other stages before it, and not without an export."""
    families.save(OF[title].build(), tmp_path / "m")
    quantize = {"bits": 8.9, "codec": "integer:group=16"}
    with pytest.raises(ExportError, match=REFUSED[title]):
        make_plan(recipe(tmp_path / "m", tmp_path / "out", quantize=quantize, export=[{"to": "onnx"}]))
    assert make_plan(recipe(tmp_path / "m", tmp_path / "out", quantize=quantize)).stages


def test_a_speed_in_onnx_runtime_is_refused_too(tmp_path: Path) -> None:
    families.save(OF["Mixtral"].build(), tmp_path / "m")
    asked = {"data": ["python:json"], "context": 32, "tokens_per_second": True}
    with pytest.raises(UsageError, match=r"mixture of experts.*Remove evaluate.tokens_per_second"):
        make_plan(recipe(tmp_path / "m", tmp_path / "out", evaluate=asked))


def test_a_model_that_writes_about_images() -> None:
    parts = {"encoder": OF["ViT"].config().to_dict(), "decoder": OF["GPT-2"].config().to_dict()}
    config = transformers.VisionEncoderDecoderConfig(**parts)
    config.architectures = ["VisionEncoderDecoderModel"]
    with pytest.raises(ExportError, match="VisionEncoderDecoderModel is an encoder-decoder"):
        require_exportable(skeleton(config))


def test_a_model_of_two_inputs(tmp_path: Path) -> None:
    """CLIP reads texts and images together."""
    text = {**families.SIZES, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1}
    parts = {"text_config": text, "vision_config": {**families.SIZES, "image_size": 16, "patch_size": 4}}
    model = transformers.CLIPModel(transformers.CLIPConfig(**parts)).eval()
    with pytest.raises(ExportError, match="CLIPModel"):
        export_onnx(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("architecture", TABLE, ids=[one.title for one in TABLE])
def test_refused_is_what_the_table_says(architecture: Architecture) -> None:
    model = skeleton(with_class(architecture))
    if architecture.onnx is True:
        require_exportable(model)
        assert (part_of(model) is not None) == (architecture.title in ("LLaVA", "Gemma 3, images"))
    else:
        with pytest.raises(ExportError):
            require_exportable(model)


def with_class(architecture: Architecture) -> transformers.PreTrainedConfig:
    config = architecture.config()
    config.architectures = [architecture.cls]
    return config
