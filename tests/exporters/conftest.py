"""Exports that several tests read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_exports import MODELS, Exported, randomised
from transformers import ViTImageProcessor

from compress.exporters import OnnxOptions, export_onnx


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Gives the export of a model of `MODELS`, made once; that of Mistral has its weights in a file of their own,
    and that of ViT an image processor."""
    done: dict[str, Exported] = {}

    def get(name: str) -> Exported:
        if name not in done:
            torch.manual_seed(0)
            model = randomised(MODELS[name]())
            folder = tmp_path_factory.mktemp("onnx") / name
            options = OnnxOptions(external_data_bytes=1000) if name == "mistral" else OnnxOptions()
            source = tmp_path_factory.mktemp("source")
            if name == "vit":
                ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(source)
            report = export_onnx(model, folder, tokenizer_from=source, options=options)
            done[name] = Exported(model, folder, report)
        return done[name]

    return get
