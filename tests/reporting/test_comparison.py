"""The comparison of models against the parts it is made of: file sizes, `evaluate`, and the text it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import compress
from compress.evaluation.evaluate import evaluate
from compress.events import Event, Events
from compress.recipe import EvaluateRecipe
from compress.reporting.comparison import Subject, compare
from compress.reporting.evaluate import evaluate as quantized
from tests.tiny_models import write_llama, write_text


def test_columns_hold_sizes_figures_and_samples(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    names = {"big": write_llama(tmp_path / "big", text, hidden=48, seed=1)}
    names["small"] = write_llama(tmp_path / "small", text, seed=2)
    packed = compress.quantize(compress.load(str(names["small"])), bits=3.0)
    packed.save_pretrained(tmp_path / "packed")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "packed" / name).write_bytes((names["small"] / name).read_bytes())
    names["packed"] = tmp_path / "packed"
    asked = EvaluateRecipe(data=[f"text:{text}"], context=16, limit=256, reference=str(names["big"]), samples=2)
    seen: list[Event] = []
    subjects = [Subject(name, str(folder)) for name, folder in names.items()]
    figures = compare(subjects, asked, scratch=tmp_path / "scratch", events=Events([seen.append]))

    assert list(figures) == list(names)
    for name, folder in names.items():
        want = evaluate(str(folder), data=f"text:{text}", context=16, limit=256, reference=str(names["big"]))
        assert {key: figures[name][key] for key in want} == want
        assert figures[name]["bytes"] == (folder / "model.safetensors").stat().st_size
    assert figures["big"]["kl_divergence"] == 0.0
    assert figures["small"]["bits_per_weight"] == 16.0
    with safe_open(names["packed"] / "model.safetensors", "pt") as file:
        stored = [file.get_slice(name) for name in file.keys() if ".layers." in name and "norm" not in name]  # noqa: SIM118
        bits = sum(8 * entry.get_shape()[0] for entry in stored)
    assert figures["packed"]["bits_per_weight"] == pytest.approx(
        bits / (figures["packed"]["parameters"] - 300 * 32 - 3 * 32)
    )
    assert [len(figures[name].get("samples", [])) for name in names] == [0, 0, 2]
    assert all(sample["prompt"] for sample in figures["packed"]["samples"])
    assert [event.data["name"] for event in seen if event.kind == "step"] == list(names)


def test_every_model_but_the_reference_is_quantized(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    small, big = write_llama(tmp_path / "small", text), write_llama(tmp_path / "big", text, hidden=64, seed=1)
    asked = EvaluateRecipe(
        data=[f"text:{text}"], context=16, limit=256, reference=str(big), activations=3, kv=2, mix_keys=False, samples=1
    )
    seen: list[Event] = []

    def figures(**folders: Path) -> dict[str, dict[str, Any]]:
        subjects = [Subject(name, str(folder)) for name, folder in folders.items()]
        return compare(subjects, asked, scratch=tmp_path / "scratch", events=Events([seen.append]))

    found = figures(big=big, small=small)
    same: dict[str, Any] = {"data": f"text:{text}", "context": 16, "limit": 256, "reference": str(big)}
    plain = evaluate(str(big), **same)
    want = quantized(str(small), **same, activations=3, kv=2, mix_keys=False)
    assert {name: found["big"][name] for name in plain} == plain and "activations" not in found["big"]
    assert {name: found["small"][name] for name in want} == want and found["small"]["kv"] == 2
    itself = figures(small=small, big=big)["big"]
    assert itself["activations"] == 3 and itself["kl_divergence"] > 0
    assert not [event for event in seen if event.kind == "note"]
    onnx = [Subject("small", str(small), tmp_path / "onnx")]
    compare(onnx, asked, scratch=tmp_path / "scratch", events=Events([seen.append]))
    assert [event.data["text"] for event in seen if event.kind == "note"] == [
        "Speeds and exports are without quantized activations, keys and values."
    ]
