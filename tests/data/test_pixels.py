"""What goes into an image model: against the processor's arithmetic, and what cannot be said otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, ViTModel

from compress.data import image_source
from compress.data.pixels import BATCH_PIXELS, calibration_images, check_processors, load_image_processor
from compress.errors import DataError, ModelError
from compress.quantization.data import calibration_batches, sample_text
from tests import families

pytest.importorskip("PIL")

SETTINGS = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.5, 0.6, 0.7],
}
MEAN, STD = (torch.tensor(SETTINGS[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
DRAWN = {"rows": 6, "context": None, "seed": 3}


def write_processor(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "preprocessor_config.json").write_text(json.dumps({**SETTINGS, **changes}))
    return folder


def vit(channels: int = 3) -> PreTrainedModel:
    torch.manual_seed(0)
    return ViTModel(ViTConfig(num_channels=channels, **SIZES)).eval()


@pytest.fixture
def images(tmp_path: Path) -> numpy.ndarray:
    """Ten images of 8 x 8; their archive is `t.npz`."""
    made = numpy.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=numpy.uint8)
    numpy.savez(tmp_path / "t.npz", x=made, y=numpy.arange(10))
    return made


def no_tokenizer() -> Any:
    raise AssertionError("images need no tokenizer")


def normalized(images: numpy.ndarray) -> torch.Tensor:
    return (torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255 - MEAN) / STD


def test_images_are_drawn_and_normalized(images: numpy.ndarray, tmp_path: Path) -> None:
    """Six of ten, none twice, the same with the same seed."""
    model = vit()
    model.config.name_or_path = str(write_processor(tmp_path))
    spec = f"images:{tmp_path / 't.npz'}#x,y"
    batches = calibration_batches(model, spec, no_tokenizer, **DRAWN)
    pixels = torch.cat([batch["pixel_values"] for batch in batches])
    assert pixels.shape == (6, 3, 8, 8) and pixels.dtype == torch.float32
    wanted = normalized(images).float()
    found = [int((wanted - image).abs().amax((1, 2, 3)).argmin()) for image in pixels]
    assert len(set(found)) == 6
    assert torch.allclose(pixels, wanted[found], atol=1e-6)
    again = calibration_batches(model, [spec], no_tokenizer, **DRAWN)
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in again]), pixels)
    other = calibration_batches(model, spec, no_tokenizer, **{**DRAWN, "seed": 4})
    assert not torch.equal(torch.cat([batch["pixel_values"] for batch in other]), pixels)
    assert sample_text(model, spec, 6, None, 3) == f"6 images of {spec}, seed 3"


def test_a_processor_that_resizes(images: numpy.ndarray, tmp_path: Path) -> None:
    """To the nearest pixel, twice as large: each pixel four times."""
    write_processor(tmp_path, do_resize=True, size={"height": 16, "width": 16}, resample=0)
    source = image_source(f"images:{tmp_path / 't.npz'}#x")
    (batch,) = calibration_images(source, load_image_processor(tmp_path), 3, rows=10)
    wanted = normalized(images.repeat(2, 1).repeat(2, 2)).float()
    assert batch["pixel_values"].shape == (10, 3, 16, 16)
    assert {tuple(one.flatten().round(decimals=4).tolist()) for one in batch["pixel_values"]} == {
        tuple(one.flatten().round(decimals=4).tolist()) for one in wanted
    }


def test_batches_are_bounded(tmp_path: Path) -> None:
    numpy.savez(tmp_path / "t.npz", x=numpy.zeros((7, 256, 512), numpy.uint8))
    source = image_source(f"images:{tmp_path / 't.npz'}#x")
    batches = calibration_images(source, load_image_processor(write_processor(tmp_path)), 3, rows=7)
    assert [len(batch["pixel_values"]) for batch in batches] == [2, 2, 2, 1] and BATCH_PIXELS == 2 * 256 * 512


@pytest.mark.parametrize(("channels", "mean"), [(1, [0.5]), (3, [0.1, 0.2, 0.3])])
def test_grey_and_colour(channels: int, mean: list[float], images: numpy.ndarray, tmp_path: Path) -> None:
    """A model gets the channels that it reads, whatever the images have."""
    processor = load_image_processor(write_processor(tmp_path, image_mean=mean, image_std=mean))
    model = vit(channels)
    for tensor in (torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(images[..., 0]).unsqueeze(1)):
        (batch,) = calibration_batches(model, tensor, no_tokenizer, processor=lambda: processor, **DRAWN)
        assert batch["pixel_values"].shape == (10, channels, 8, 8)
        with torch.no_grad():
            assert model(**batch).last_hidden_state.isfinite().all()


def test_tensors_and_batches(images: numpy.ndarray, tmp_path: Path) -> None:
    model, ready = vit(), normalized(images).float()
    processor = load_image_processor(write_processor(tmp_path))
    raw = torch.from_numpy(images).permute(0, 3, 1, 2)
    (made,) = calibration_batches(model, raw, no_tokenizer, processor=lambda: processor, **DRAWN)
    assert torch.allclose(made["pixel_values"], ready, atol=1e-6)
    (given,) = calibration_batches(model, ready.double(), no_tokenizer, **DRAWN)
    assert torch.equal(given["pixel_values"], ready)
    batches = [{"pixel_values": ready[:4]}, {"pixel_values": ready[4:]}]
    found = calibration_batches(model, batches, no_tokenizer, **DRAWN)
    assert [len(batch["pixel_values"]) for batch in found] == [4, 6]


PIXELS = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (PIXELS[0], r"\[3, 8, 8\] of torch\.float32"),
        (PIXELS.long(), r"torch\.int64"),
        (PIXELS[:0], r"\[0, 3, 8, 8\]"),
        (PIXELS[:, :2], r"\[2, 2, 8, 8\]"),
        (PIXELS.log(), "not finite"),
        ([{"input_ids": torch.zeros(1, 2).long()}], "no list of {'pixel_values'"),
        ([{"pixel_values": PIXELS.byte()}], r"torch\.uint8"),
        ("text:x", "reads images, and 'text:x' is text"),
        (["images:x", "text:x"], "reads images, and 'text:x' is text"),
        ([], "No data is named"),
    ],
)
def test_refusals(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        calibration_batches(vit(), data, no_tokenizer, processor=lambda: None, **DRAWN)  # type: ignore[arg-type]
    assert caught.value.remedy


def test_sizes_that_the_model_refuses() -> None:
    """Also of a model that has no weights yet, as when a checkpoint is rounded block by block."""
    hollow = PreTrainedModel.to(vit(), "meta")
    for model in (vit(), hollow):
        (taken,) = calibration_batches(model, PIXELS, no_tokenizer, **DRAWN)
        assert taken["pixel_values"].shape == PIXELS.shape
        with pytest.raises(DataError, match="ViTModel refuses images of 12 x 12") as caught:
            calibration_batches(model, torch.zeros(2, 3, 12, 12), no_tokenizer, **DRAWN)
        assert "preprocessor_config.json" in caught.value.remedy


def test_images_for_a_model_of_text() -> None:
    with pytest.raises(DataError, match="reads text, and 'images:x' are images"):
        calibration_batches(families.llama(), "images:x", no_tokenizer, **DRAWN)


def test_too_few_images(images: numpy.ndarray, tmp_path: Path) -> None:
    source = image_source(f"images:{tmp_path / 't.npz'}#x")
    with pytest.raises(DataError, match="has 10 images, not 11") as caught:
        calibration_images(source, load_image_processor(write_processor(tmp_path)), 3, rows=11)
    assert "--rows 10" in caught.value.remedy


def test_mixed_sizes(tmp_path: Path) -> None:
    from PIL import Image

    for name, side in {"a": 8, "b": 8, "c": 12}.items():
        Image.fromarray(numpy.zeros((side, 8, 3), numpy.uint8)).save(tmp_path / f"{name}.png")
    source = image_source(f"images:{tmp_path}")
    fixed = load_image_processor(write_processor(tmp_path))
    with pytest.raises(DataError, match=r"8x8 and 12x8|12x8 and 8x8") as caught:
        calibration_images(source, fixed, 3, rows=3)
    assert "do_resize" in caught.value.remedy
    scaled = load_image_processor(write_processor(tmp_path, do_resize=True, size={"height": 8, "width": 8}))
    assert calibration_images(source, scaled, 3, rows=3)[0]["pixel_values"].shape == (3, 3, 8, 8)


def test_processors_that_cannot_be_had(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has no preprocessor_config\.json") as caught:
        load_image_processor(tmp_path)
    assert "save_pretrained" in caught.value.remedy and "pixel_values" in caught.value.remedy
    for broken in ("{", '{"image_processor_type": "Nope"}'):
        (tmp_path / "preprocessor_config.json").write_text(broken)
        with pytest.raises(ModelError, match="transformers cannot read"):
            load_image_processor(tmp_path)
    with pytest.raises(ModelError, match="comes from no folder"):
        calibration_batches(vit(), PIXELS.byte(), no_tokenizer, **DRAWN)


def test_processors_that_differ(tmp_path: Path) -> None:
    one = load_image_processor(write_processor(tmp_path / "one"))
    other = load_image_processor(write_processor(tmp_path / "other", image_mean=[0.5, 0.5, 0.5]))
    check_processors("one", one, "again", load_image_processor(tmp_path / "one"))
    with pytest.raises(ModelError, match=r"differ: image_mean is \(0\.1, 0\.2, 0\.3\)"):
        check_processors("one", one, "other", other)


def test_a_classifier_reads_images_too() -> None:
    model = ViTForImageClassification(ViTConfig(num_labels=4, **SIZES))
    with pytest.raises(DataError, match="reads images"):
        calibration_batches(model, "builtin:python/val", no_tokenizer, **DRAWN)
