"""Exports run in ONNX Runtime, against torch and against `model.generate`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from tiny_exports import GROUPED, VOCABULARY, Exported, bert, pack
from transformers import LlamaConfig, LlamaForCausalLM

import compress
from compress.errors import DependencyError, ExportError, UsageError
from compress.evaluation.generate import OnnxDecoder, generate_greedy
from compress.evaluation.latency import tokens_per_second
from compress.events import Event, Events
from compress.exporters import export, export_onnx, verification
from compress.exporters.verification import verify_decoder
from compress.modeling.loading import load_model
from compress.quantization.modules import packed_modules

Get = Callable[[str], Exported]
DECODERS = ("llama", "qwen2", "qwen3", "mistral", "gpt2", "opt")


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens_equal_those_of_torch(exported: Get, name: str) -> None:
    case = exported(name)
    ids = torch.randint(VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    expected = generate_greedy(case.model, ids, 100, attention_mask=mask)
    found = OnnxDecoder(case.folder).generate(ids, 100, attention_mask=mask)
    assert expected.shape == (2, 105)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", [*DECODERS, "bert"])
def test_report_has_a_small_error_for_each_input(exported: Get, name: str) -> None:
    report = exported(name).report
    assert len(report.errors) == (3 if name == "bert" else 10)
    assert 0 < report.max_relative_error <= 2e-6
    assert report.provider == "CPUExecutionProvider"
    assert report.ir_version <= 13
    assert json.loads((exported(name).folder / "report.json").read_text()) == report.to_dict()


def test_names_and_dynamic_axes_of_a_decoder(exported: Get) -> None:
    graph = onnx.load(exported("llama").folder / "model.onnx").graph

    def shapes(values: object) -> dict[str, list[str | int]]:
        return {
            value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
            for value in values  # type: ignore[attr-defined]
        }

    pasts = [f"{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")]
    assert shapes(graph.input) == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total"],
        "position_ids": ["batch", "sequence"],
        **{f"past_key_values.{past}": ["batch", 2, "past", 16] for past in pasts},
    }
    assert shapes(graph.output) == {
        "logits": ["batch", "sequence", VOCABULARY],
        **{f"present.{past}": ["batch", 2, "total", 16] for past in pasts},
    }


def test_file_says_nothing_of_the_machine_that_made_it(exported: Get) -> None:
    assert b"site-packages" not in (exported("llama").folder / "model.onnx").read_bytes()


def test_tied_weight_is_stored_once(exported: Get) -> None:
    case = exported("llama")
    stored = [list(value.dims) for value in onnx.load(case.folder / "model.onnx").graph.initializer]
    assert stored.count([VOCABULARY, 64]) + stored.count([64, VOCABULARY]) == 1
    assert case.report.model_bytes < 4 * case.report.parameters + 70_000


def test_packed_matrices_are_the_operator_and_counted(exported: Get) -> None:
    case = exported("qwen2")
    nodes = [node for node in onnx.load(case.folder / "model.onnx").graph.node if node.op_type == "MatMulNBits"]
    bits = sorted(attribute.i for node in nodes for attribute in node.attribute if attribute.name == "bits")
    assert bits == [4] * 6 + [8]
    assert case.report.matrices == {"4 bit": 6, "8 bit": 1}
    # rows of the seven matrices by blocks of a row, each block 16 codes and a scale
    narrow = (64 + 32 + 32 + 64 + 100 + 100) * 4 * (16 * 4 + 32)
    wide = 64 * 7 * (16 * 8 + 32)
    weights = 64 * (64 + 32 + 32 + 64 + 100 + 100) + 100 * 64
    assert case.report.container_bits_per_weight == pytest.approx((narrow + wide) / weights, rel=1e-12)


def test_unquantized_matrices_count_as_stored(exported: Get) -> None:
    report = exported("mistral").report
    assert (report.container_bits_per_weight, report.matrices) == (32.0, {"float32": 7})


def test_external_data(exported: Get) -> None:
    case = exported("mistral")
    graph, data = (case.report.files[name] for name in ("model.onnx", "model.onnx.data"))
    assert case.report.model_bytes == graph + data
    assert data > 3.5 * case.report.parameters
    assert "model.onnx.data" not in exported("llama").report.files


def test_model_is_as_before(exported: Get) -> None:
    model = exported("bert").model
    assert model.config._attn_implementation == "sdpa"
    assert sum(type(module).__name__ == "PackedLinear" for module in model.modules()) == 6
    assert not model.training


def test_config_needs_no_plugin(exported: Get) -> None:
    config = json.loads((exported("qwen3").folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert "quantization_config" not in config


def test_program_of_the_card_prints_the_tokens_of_torch(exported: Get) -> None:
    case = exported("llama")
    program = re.search(r"```python\n(.*?)```", (case.folder / "README.md").read_text(), re.DOTALL)
    assert program is not None
    run = subprocess.run(
        [sys.executable, "-c", program[1]], cwd=case.folder, capture_output=True, text=True, check=True
    )
    expected = generate_greedy(case.model, torch.tensor([[1, 2, 3]]), 40)[0]
    assert [int(word) for word in re.findall(r"\d+", run.stdout)] == expected.tolist()


def test_groups_of_8_are_rounded_and_said_to_be(tmp_path: Path) -> None:
    model = compress.quantize(LlamaForCausalLM(LlamaConfig(**GROUPED)).eval(), bits=3.7)
    events: list[Event] = []
    report = export_onnx(model, tmp_path / "out", events=Events([events.append]))
    assert set(report.matrices) == {"8 bit (rounded)"}
    assert 0 < report.rounding_error < 1e-4 and report.max_relative_error < 1e-5
    warnings = [event.data["text"] for event in events if event.kind == "warning"]
    assert len(warnings) == 1 and "rounded once more" in warnings[0]
    assert len(packed_modules(model)) == sum(report.matrices.values())


def test_another_model_does_not_verify(exported: Get) -> None:
    case = exported("llama")
    other = LlamaForCausalLM(case.model.config).eval()
    with pytest.raises(ExportError, match="does not agree"):
        verify_decoder(other, case.folder)


def test_a_failed_verification_leaves_nothing_and_prints_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verification, "TOLERANCE", 0.0)
    with pytest.raises(ExportError, match="does not agree"):
        export_onnx(bert(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_exported_is_refused_at_once(tmp_path: Path) -> None:
    half = LlamaForCausalLM(LlamaConfig(**GROUPED)).to(torch.bfloat16)
    with pytest.raises(ExportError, match="float32 on the CPU"):
        export_onnx(half, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_taken_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        export_onnx(LlamaForCausalLM(LlamaConfig(**GROUPED)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DependencyError, match=rf"'{package}'.*\[onnx\]"):
        export_onnx(LlamaForCausalLM(LlamaConfig(**GROUPED)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'onnx'"):
        export(LlamaForCausalLM(LlamaConfig(**GROUPED)), tmp_path / "out", to="onx")


@pytest.mark.parametrize("packed", [False, True])
def test_a_trained_model_with_its_tokenizer(real_data: Path, tmp_path: Path, packed: bool) -> None:
    source = real_data / "models" / "stories260k"
    model = pack(load_model(source)) if packed else load_model(source)
    report = export_onnx(model, tmp_path / "out", tokenizer_from=source)
    assert report.max_relative_error <= 2e-6
    ids = torch.tensor([[1, 403, 407]])
    assert torch.equal(OnnxDecoder(tmp_path / "out").generate(ids, 100), generate_greedy(model, ids, 100))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_speed_in_onnx_runtime_is_reported_with_its_threads(exported: Get) -> None:
    decoder = OnnxDecoder(exported("llama").folder, threads=1)
    result = tokens_per_second(decoder, prompt_tokens=3, new_tokens=4, repeats=2)
    assert (result.runtime, result.threads, len(result.seconds)) == ("onnxruntime", 1, 2)
    assert result.tokens_per_second > 0
