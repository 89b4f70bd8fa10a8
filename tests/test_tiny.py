"""The whole tool once, in seconds: distil, quantize, load, export, run in ONNX Runtime, compare."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import compress
from compress.evaluation.generate import OnnxDecoder, generate_greedy
from compress.modeling.loading import load_model
from compress.recipe import make_recipe
from tests.tiny_models import write_llama, write_text

pytestmark = pytest.mark.tiny


def test_from_a_teacher_to_a_quantized_student_in_onnx_runtime(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    teacher = write_llama(tmp_path / "teacher", text, hidden=64, seed=1)
    student = write_llama(tmp_path / "student", text, seed=2)
    recipe = make_recipe(
        {
            "model": str(student),
            "out": str(tmp_path / "out"),
            "distill": {
                "teacher": str(teacher),
                "data": f"text:{text}",
                "losses": ["kl"],
                "steps": 4,
                "batch_size": 2,
                "context": 32,
                "log_every": 1,
            },
            "quantize": {"bits": 3.25},
            "export": [{"to": "onnx"}],
            "evaluate": {
                "data": f"text:{text}",
                "context": 32,
                "limit": 512,
                "reference": str(teacher),
                "compare": [str(teacher)],
                "samples": 1,
            },
        }
    )
    report = compress.run(recipe)

    out = tmp_path / "out"
    assert json.loads((out / "report.json").read_text())["evaluate"] == report["evaluate"]
    models = report["evaluate"]["models"]
    assert models[str(teacher)]["kl_divergence"] == 0.0
    quantized = models["quantized"]
    assert quantized["bits_per_weight"] <= 3.25 < models["distilled"]["bits_per_weight"] == 16.0
    assert quantized["kl_divergence"] > 0.0

    model = load_model(str(out / "quantized"))
    ids = torch.arange(1, 9)[None]
    assert torch.equal(OnnxDecoder(out / "onnx").generate(ids, 20), generate_greedy(model, ids, 20))
