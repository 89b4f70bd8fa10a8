"""`compress transform`: the same function, an ordinary checkpoint, on after a stop with the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import compress
from compress.codecs import codec
from compress.errors import ModelError, UsageError
from compress.events import Event, Events
from compress.modeling.loading import load_model
from compress.quantization.allocation import uniform
from compress.quantization.checkpoint import transform_checkpoint
from compress.quantization.options import Nearest
from compress.quantization.rounders import CalibrationOptions
from compress.quantization.target import open_target
from compress.quantization.transforms import parse_transform
from compress.transforms.learned import is_rotation
from compress.workspace import Workspace
from tests import families

IDS = torch.randint(0, 96, (12, 12), generator=torch.Generator().manual_seed(0))
LEARN = "ost:steps=12,batch=2,rotation_rate=0.02,activations=4,kv=4"
INTEGER = codec("integer", group=16)


def save(folder: Path, dtype: torch.dtype, **changes: Any) -> Path:
    families.llama(**changes).to(dtype).save_pretrained(folder)
    return folder


def transform(source: Path, out: Path, text: str = LEARN, data: Any = IDS, listener: Any = None, **more: Any) -> Any:
    chosen = parse_transform(text)
    views = open_target(source).views
    calibration = None if data is None else CalibrationOptions(data, Nearest())
    with Workspace.open(out.with_name(f"{out.name}.work"), {}, events=Events([listener] if listener else [])) as work:
        return transform_checkpoint(
            source,
            out,
            chosen,  # type: ignore[arg-type]
            work,
            codec=INTEGER,
            specs=uniform(views, INTEGER, 5.5),
            calibration=calibration,
            **more,
        )


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("text", "tied"), [(LEARN, False), (LEARN, True), ("hadamard", True)])
def test_any_tool_loads_the_same_function(tmp_path: Path, text: str, tied: bool) -> None:
    """Without the help of this package, from float32 and, written in float32, from bfloat16."""
    ids = families.token_ids()
    for dtype, asked in ((torch.float32, "stored"), (torch.bfloat16, "float32")):
        source = save(tmp_path / f"{dtype}", dtype, tie_word_embeddings=tied)
        expected = families.logits(load_model(source), ids)
        out = tmp_path / f"{dtype}-out"
        record = transform(source, out, text, IDS if "ost" in text else None, dtype=asked)
        again = transformers.AutoModelForCausalLM.from_pretrained(out)
        assert again.dtype == torch.float32
        assert relative(families.logits(again, ids), expected) < 1e-4
        assert again.config.tie_word_embeddings is False
        weights = load_file(out / "model.safetensors")
        assert all(tensor.dtype == torch.float32 for tensor in weights.values())
        assert record["model_bytes"] == (out / "model.safetensors").stat().st_size
        name = "model.layers.0.self_attn.q_proj.weight"
        assert not torch.equal(weights[name], load_model(source).get_parameter(name))


def test_in_memory_is_the_checkpoint(tmp_path: Path) -> None:
    source = save(tmp_path / "source", torch.float32)
    transform(source, tmp_path / "out")
    model = compress.transform(load_model(source), LEARN, data=IDS, codec=INTEGER, bits=5.5)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(written[name], parameter), name


def test_a_stopped_learning_goes_on_with_the_same_bytes(tmp_path: Path) -> None:
    source = save(tmp_path / "source", torch.float32)
    transform(source, tmp_path / "whole")
    steps: list[int] = []

    def stop(event: Event) -> None:
        if event.kind == "step" and event.data["stage"] == "learn":
            steps.append(event.data["index"])
            if len(steps) == 11:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transform(source, tmp_path / "out", listener=stop)
    assert not (tmp_path / "out").exists()
    transform(source, tmp_path / "out", listener=stop)
    assert steps == [*range(1, 12), *range(11, 13)]
    names = [path.name for path in (tmp_path / "out").iterdir()]
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    transform(source, tmp_path / "out", listener=stop)
    assert len(steps) == 13


def test_what_is_learned_is_in_the_work_folder_once(tmp_path: Path) -> None:
    transform(save(tmp_path / "source", torch.float32), tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out.work" / "transform").iterdir())
    assert files == ["learned.safetensors"]
    for name, tensor in load_file(tmp_path / "out.work" / "transform" / files[0]).items():
        if is_rotation(name):
            eye = torch.eye(tensor.shape[-1])
            assert float((tensor.mT @ tensor - eye).abs().max()) < 1e-5


def test_then_quantized_by_another_run(tmp_path: Path) -> None:
    source = save(tmp_path / "source", torch.float32)
    transform(source, tmp_path / "out")
    model = compress.quantize(load_model(tmp_path / "out"), bits=4, codec="integer:group=16", data=IDS)
    assert torch.isfinite(families.logits(model, families.token_ids())).all()


def test_what_cannot_be(tmp_path: Path) -> None:
    source = save(tmp_path / "source", torch.float32)
    with pytest.raises(UsageError, match="learned from data"):
        transform(source, tmp_path / "out", data=None)
    with pytest.raises(UsageError, match="is inside the model's folder"):
        transform(source, source / "inside")
    bert = tmp_path / "bert"
    families.build("BertForMaskedLM", "bert").save_pretrained(bert)
    for text, message in ((LEARN, "has no place for a learned transform"), ("hadamard", "can be folded")):
        with pytest.raises(ModelError, match=message):
            transform(bert, tmp_path / "out", text)
        with pytest.raises(ModelError, match=message):
            compress.transform(load_model(bert), text, data=IDS)
    with pytest.raises(UsageError, match="folds nothing"):
        compress.transform(load_model(source), "none")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
