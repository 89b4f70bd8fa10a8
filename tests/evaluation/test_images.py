"""The figures of image models against their definitions, image by image, in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from compress.data import ImageSource, image_source
from compress.data.pixels import load_image_processor
from compress.errors import DataError, ModelError, NumericsError, UsageError
from compress.evaluation.evaluate import evaluate
from compress.evaluation.images import class_numbers, evaluate_images, spread
from compress.plan import make_plan
from compress.recipe import Recipe
from tests import families

Image = pytest.importorskip("PIL.Image")

PROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "do_resize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip
VIT: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
RESNET: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
COUNT, CLASSES = 300, 5


def made(kind: type[PreTrainedModel], seed: int, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes, config = (VIT, ViTConfig) if "ViT" in kind.__name__ else (RESNET, ResNetConfig)
    model = kind(config(**{**sizes, "num_labels": CLASSES, **changes})).eval()  # type: ignore[arg-type]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive `t.npz` of 300 images of 8 x 8, more than go through a model at once, and a processor."""
    folder = tmp_path_factory.mktemp("images")
    draw = numpy.random.default_rng(0)
    images = draw.integers(0, 256, (COUNT, 8, 8, 3), dtype=numpy.uint8)
    numpy.savez(folder / "t.npz", x=images, y=draw.integers(0, CLASSES, COUNT), wrong=numpy.arange(COUNT))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    return load_image_processor(folder)


@pytest.fixture(scope="module")
def source(folder: Path) -> ImageSource:
    return image_source(f"images:{folder / 't.npz'}#x,y")


def pixels_of(source: ImageSource, index: int) -> torch.Tensor:
    array = torch.from_numpy(source.pixels(index, 3).copy()).permute(2, 0, 1).unsqueeze(0)
    return (array.float() / 255 - 0.5) / 0.5


@pytest.mark.parametrize("kind", [ViTForImageClassification, ResNetForImageClassification])
def test_figures_are_their_definitions(
    kind: type[PreTrainedModel], source: ImageSource, processor: Any, folder: Path
) -> None:
    model, reference = made(kind, 0), made(kind, 1)
    got = evaluate_images(model, reference, processor, source, limit=40)
    chosen = [index * COUNT // 40 for index in range(40)]
    assert chosen == list(spread(COUNT, 40)) and chosen[-1] > COUNT - 9
    labels = numpy.load(folder / "t.npz")["y"]
    kl, same, right, reference_right = [], [], [], []
    with torch.no_grad():
        for index in chosen:
            q, p = (F.log_softmax(m(pixels_of(source, index)).logits[0].double(), -1) for m in (model, reference))
            kl.append(float((p.exp() * (p - q)).sum()))
            same.append(float(q.argmax() == p.argmax()))
            right.append(float(q.argmax() == labels[index]))
            reference_right.append(float(p.argmax() == labels[index]))
    assert got["images"] == 40
    assert got["kl_divergence"] == pytest.approx(numpy.mean(kl), rel=1e-4)
    assert got["kl_stderr"] == pytest.approx(numpy.std(kl, ddof=1) / 40**0.5, rel=1e-4)
    assert got["top1_agreement"] == pytest.approx(numpy.mean(same))
    assert got["accuracy"] == pytest.approx(numpy.mean(right))
    assert got["reference_accuracy"] == pytest.approx(numpy.mean(reference_right))


@pytest.mark.parametrize(
    ("kind", "changes"), [(ViTModel, {}), (ViTModel, {"add_pooling_layer": False}), (ResNetModel, {})]
)
def test_cosine_of_pooled_outputs(
    kind: type[PreTrainedModel], changes: dict[str, Any], source: ImageSource, processor: Any
) -> None:
    """What the model calls its pooled output; the mean over patches of one that has none."""
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = ViTConfig(**VIT) if kind is ViTModel else ResNetConfig(**RESNET)
        models.append(kind(config, **changes).eval())  # type: ignore[arg-type]
    got = evaluate_images(models[0], models[1], processor, source, limit=20)
    cosines = []
    with torch.no_grad():
        for index in spread(COUNT, 20):
            outputs = [model(pixels_of(source, index)) for model in models]
            pooled = [one.last_hidden_state.mean(1) if changes else one.pooler_output.flatten(1) for one in outputs]
            cosines.append(float(F.cosine_similarity(*(one.double() for one in pooled))))
    assert got == {"cosine": pytest.approx(numpy.mean(cosines), abs=1e-6), "images": 20}


def test_a_model_does_not_differ_from_itself(source: ImageSource, processor: Any) -> None:
    """Over all images, in batches of which the last is not full."""
    model = made(ViTForImageClassification, 0)
    got = evaluate_images(model, model, processor, source)
    assert got["images"] == COUNT and got["top1_agreement"] == 1.0 and got["kl_divergence"] == 0.0
    assert got["accuracy"] == got["reference_accuracy"]


def test_the_verb(folder: Path, tmp_path: Path) -> None:
    """Of models in folders, and of models as objects with a processor."""
    model, reference = made(ViTForImageClassification, 0), made(ViTForImageClassification, 1)
    for name, one in {"model": model, "reference": reference}.items():
        one.save_pretrained(tmp_path / name)
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    spec = f"images:{folder / 't.npz'}#x,y"
    got = evaluate(str(tmp_path / "model"), reference=str(tmp_path / "reference"), data=spec, limit=30)
    assert got["data"]["documents"] == COUNT and "context" not in got
    again = evaluate(model, reference=reference, data=[spec], limit=30, image_processor=load_image_processor(folder))
    assert {name: got[name] for name in ("accuracy", "top1_agreement")} == {
        name: again[name] for name in ("accuracy", "top1_agreement")
    }
    assert evaluate(str(tmp_path / "model"), data=spec, limit=30)["accuracy"] == got["accuracy"]
    (tmp_path / "reference" / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, "do_resize": True}))
    with pytest.raises(ModelError, match="do_resize is False in the one and True in the other"):
        evaluate(str(tmp_path / "model"), reference=str(tmp_path / "reference"), data=spec)


def test_plans(folder: Path, tmp_path: Path) -> None:
    """What a model does not read is refused before anything runs; what it reads is planned."""
    model = made(ViTForImageClassification, 0, hidden_size=32)
    model.save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    families.save(families.llama(), tmp_path / "llama")
    images = f"images:{folder / 't.npz'}#x,y"
    quantize = {"codec": "integer:group=8", "bits": 6, "data": images, "rows": 8}

    def plan(name: str, **parts: Any) -> Any:
        return make_plan(Recipe.model_validate({"model": str(tmp_path / name), "out": str(tmp_path / "q"), **parts}))

    planned = plan("vit", quantize=quantize, evaluate={"data": images, "limit": 30})
    assert planned.data[0]["documents"] == COUNT
    assert planned.stages[-1].text.endswith(f"on {images}, 30 images at most")
    with pytest.raises(DataError, match="reads images, and 'builtin:python/val' is text"):
        plan("vit", quantize={**quantize, "data": "builtin:python/val"})
    with pytest.raises(DataError, match="reads images, and 'builtin:python/val' is text"):
        plan("vit", quantize=quantize, evaluate={"data": "builtin:python/val"})
    with pytest.raises(DataError, match=r"reads text, and 'images:.*' are images"):
        plan("llama", quantize=quantize)
    with pytest.raises(DataError, match=r"reads text, and 'images:.*' are images"):
        plan("llama", quantize={"bits": 6}, evaluate={"data": images})
    with pytest.raises(UsageError, match="is an image model and writes no text"):
        plan("vit", quantize=quantize, evaluate={"data": images, "samples": 2})


def in_folders(folder: Path, names: list[str]) -> ImageSource:
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        Image.fromarray(numpy.full((8, 8, 3), number, numpy.uint8)).save(folder / name / "a.png")
    return image_source(f"images:{folder}")


NAMED = {"id2label": {0: "Zebra", 1: "ant", 2: "bee"}, "label2id": {"Zebra": 0, "ant": 1, "bee": 2}}


@pytest.mark.parametrize(
    ("folders", "config", "numbers"),
    [
        (["ant", "zebra"], NAMED, [1, 0]),
        (["0", "2"], NAMED, [0, 2]),
        (["x", "y", "z"], {"num_labels": 3}, [0, 1, 2]),
        (["x", "y"], {"num_labels": 3}, None),
        (["ant", "moth", "zebra"], NAMED, None),
    ],
)
def test_classes_of_folders(
    folders: list[str], config: dict[str, Any], numbers: list[int] | None, tmp_path: Path
) -> None:
    found, why_not = class_numbers(in_folders(tmp_path, folders), ViTConfig(**config))
    assert found == numbers and (why_not is None) == (numbers is not None)


def test_folders_of_other_classes_are_said(tmp_path: Path, processor: Any) -> None:
    model = made(ViTForImageClassification, 0)
    source = in_folders(tmp_path, ["x", "y"])
    got = evaluate_images(model, made(ViTForImageClassification, 1), processor, source)
    assert got["labels"] == "not used: 'x' is no class of the model" and "accuracy" not in got
    with pytest.raises(UsageError, match="'x' is no class of the model"):
        evaluate_images(model, None, processor, source)


def test_numbers_that_are_no_class(folder: Path, processor: Any) -> None:
    with pytest.raises(DataError, match="go from 0 to 299; the model has the classes 0 to 4"):
        wrong = image_source(f"images:{folder / 't.npz'}#x,wrong")
        evaluate_images(made(ViTForImageClassification, 0), None, processor, wrong)


def test_models_that_cannot_be_compared(source: ImageSource, processor: Any) -> None:
    model = made(ViTForImageClassification, 0)
    with pytest.raises(ModelError, match="5 classes, the reference 3"):
        evaluate_images(model, made(ViTForImageClassification, 0, num_labels=3), processor, source)
    with pytest.raises(ModelError, match="5 classes, the reference none"):
        evaluate_images(model, ViTModel(ViTConfig(**VIT)), processor, source)
    with pytest.raises(UsageError, match="without classes is measured against another"):
        evaluate_images(ViTModel(ViTConfig(**VIT)), None, processor, source)
    large = made(ViTForImageClassification, 0, image_size=16)
    with pytest.raises(DataError, match=r"refuses images of .* \(8 x 8\)") as caught:
        evaluate_images(large, None, processor, source)
    assert "preprocessor_config.json" in caught.value.remedy
    torch.nn.init.constant_(model.classifier.bias, torch.nan)  # type: ignore[union-attr, arg-type]
    with pytest.raises(NumericsError, match="not finite"):
        evaluate_images(model, None, processor, source)


def test_kinds_are_told_apart(folder: Path) -> None:
    spec = f"images:{folder / 't.npz'}#x"
    vit = made(ViTForImageClassification, 0)
    with pytest.raises(DataError, match="'ViTForImageClassification' reads images, and 'builtin:python/val' is text"):
        evaluate(vit, data="builtin:python/val")
    with pytest.raises(DataError, match=r"'LlamaForCausalLM' reads text, and 'images:.*' are images"):
        evaluate(families.llama(), data=spec)
    with pytest.raises(ModelError, match="is an image model, and the reference 'LlamaForCausalLM' is a decoder"):
        evaluate(vit, reference=families.llama(), data=spec)
    with pytest.raises(UsageError, match="needs its image processor"):
        evaluate(vit, data=spec)
