"""From folder to folder: the same codes as in memory, resumed without a difference, refused with one message."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from compress.codecs import Codec, CodecSpec, QuantizedMatrix, codec
from compress.errors import ArtifactError, CompressError, ModelError, NumericsError, UsageError, WorkspaceError
from compress.events import Event, Events
from compress.formats.native import Artifact
from compress.modeling.io import INDEX, WEIGHTS, Checkpoint, read_tensors
from compress.modeling.loading import parameter_count, read_config
from compress.modeling.writer import write_tensors
from compress.quantization.allocation import uniform
from compress.quantization.run import quantize_checkpoint
from compress.quantization.target import open_target, predict
from compress.workspace import Workspace
from tests import families

PYRAMID = codec("pyramid")
TIMED = ("seconds", "peak_rss_bytes")


def quantize(source: Path, out: Path, bits: float = 3.25, method: Codec = PYRAMID, **options: Any) -> dict[str, Any]:
    listeners = options.pop("listeners", [])
    target = open_target(source)
    specs = uniform(target.views, method, bits)
    with Workspace.open(out.with_name(f"{out.name}-work"), {"bits": bits}) as work:
        return quantize_checkpoint(source, out, specs, method, work, Events(listeners), bits_target=bits, **options)


def contents(folder: Path) -> Mapping[str, bytes]:
    """All files of an artifact; of the report without what is timed, without the checksums, which cover it."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "compress.json"]
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    report = json.loads(files["report.json"])
    files["report.json"] = json.dumps({k: v for k, v in report.items() if k not in TIMED}).encode()
    return files


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = families.save(families.llama().to(torch.bfloat16), tmp_path_factory.mktemp("llama") / "tiny")
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.txt").write_text("notes")
    return folder


@pytest.fixture(scope="module")
def artifact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifact") / "out"
    quantize(source, out)
    return out


def test_codes_are_those_of_each_matrix_alone(source: Path, artifact: Path) -> None:
    stored, found = load_file(source / WEIGHTS), load_file(artifact / WEIGHTS)
    opened = Artifact(artifact)
    assert len(opened.modules) == 14
    for name, view in opened.modules.items():
        matrix = opened.matrix(name)
        assert torch.equal(found[view.parameter], matrix.payload())
        again = PYRAMID.quantize(stored[view.parameter].float(), matrix.spec)
        assert torch.equal(again.payload(), matrix.payload())
    packed = {view.parameter for view in opened.modules.values()}
    assert found.keys() == stored.keys()
    for name in stored.keys() - packed:
        assert found[name].dtype == stored[name].dtype
        assert torch.equal(found[name], stored[name])


def test_report(source: Path, artifact: Path) -> None:
    report = json.loads((artifact / "report.json").read_text())
    parameters = parameter_count(families.llama())
    payload = sum(tensor.numel() for tensor in load_file(artifact / WEIGHTS).values() if tensor.dtype == torch.int8)
    weights = sum(row["shape"][0] * row["shape"][1] for row in report["matrices"])
    assert report["bits_target"] == 3.25
    assert report["bits_per_weight"] == 8 * payload / weights
    assert report["model_bytes"] == (artifact / WEIGHTS).stat().st_size
    assert report["original_bytes"] == (source / WEIGHTS).stat().st_size
    assert report["model_bits_per_weight"] == 8 * report["model_bytes"] / parameters
    assert report["parameters"] == parameters
    assert report["seconds"] > 0
    assert report["peak_rss_bytes"] > 10**7
    assert report["backend"] in ("native", "reference")
    row = report["matrices"][0]
    assert set(row) == {"name", "shape", "codec", "bits_per_weight", "relative_error", "sqnr_db", "status"}
    assert (row["name"], row["codec"], row["status"]) == ("model.layers.0.self_attn.q_proj", "pyramid", "quantized")
    original = load_file(source / WEIGHTS)[f"{row['name']}.weight"].double()
    decoded = Artifact(artifact).matrix(row["name"]).dequantize().double()
    assert row["relative_error"] == pytest.approx(float((original - decoded).norm() ** 2 / original.norm() ** 2))


def test_what_belongs_to_the_model_is_copied(artifact: Path) -> None:
    assert (artifact / "tokenizer.json").read_text() == '{"a": 1}'
    assert not (artifact / "extra").exists()
    assert "import compress" in (artifact / "README.md").read_text()
    config = read_config(artifact)
    assert config["quantization_config"]["quant_method"] == "compress"
    assert config["hidden_size"] == 32
    names = {path.relative_to(artifact).as_posix() for path in artifact.rglob("*") if path.is_file()}
    listed = json.loads((artifact / "compress.json").read_text())["files"]
    assert names == listed.keys() | {"compress.json"}


@pytest.mark.parametrize(("bits", "max_shard_bytes"), [(2.2, 10**9), (3.7, 6000)])
def test_predicted_size_is_the_size(source: Path, tmp_path: Path, bits: float, max_shard_bytes: int) -> None:
    target = open_target(source)
    specs = uniform(target.views, PYRAMID, bits)
    report = quantize(source, tmp_path / "out", bits, max_shard_bytes=max_shard_bytes)
    prediction = predict(target, specs, max_shard_bytes)
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert prediction.model_bytes == sum(path.stat().st_size for path in shards) == report["model_bytes"]
    assert prediction.bits_per_weight == report["bits_per_weight"]
    assert (len(shards) > 1) == (max_shard_bytes == 6000) == (tmp_path / "out" / INDEX).exists()


def test_sharded_source_and_sharded_result_are_the_same_model(source: Path, artifact: Path, tmp_path: Path) -> None:
    sharded = families.save(families.llama().to(torch.bfloat16), tmp_path / "tiny", max_shard_size="8KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    quantize(sharded, tmp_path / "out", max_shard_bytes=5000)
    whole, parts = Checkpoint(artifact), Checkpoint(tmp_path / "out")
    assert whole.names() == parts.names()
    assert all(torch.equal(whole.read(name), parts.read(name)) for name in whole.names())


@pytest.mark.parametrize("place", ["out", "deep/er/out", "."])
def test_results_inside_the_model_are_refused(source: Path, tmp_path: Path, place: str) -> None:
    before = sorted(source.rglob("*"))
    target = open_target(source)
    specs = uniform(target.views, PYRAMID, 3.25)
    with Workspace.open(tmp_path / "work", {}) as work, pytest.raises(UsageError, match="inside the model's folder"):
        quantize_checkpoint(source, source / place, specs, PYRAMID, work, Events())
    assert sorted(source.rglob("*")) == before


def test_a_work_folder_inside_the_model_is_refused(tmp_path: Path) -> None:
    inner = families.save(families.llama(num_hidden_layers=1), tmp_path / "m")
    specs = uniform(open_target(inner).views, PYRAMID, 3.25)
    with (
        Workspace.open(inner / "work", {}) as work,
        pytest.raises(UsageError, match=r"inside the model's folder .* another --work"),
    ):
        quantize_checkpoint(inner, tmp_path / "out", specs, PYRAMID, work, Events())


@dataclass
class Failing:
    """The pyramid, which fails at the given matrix; everything else is handed on."""

    calls: int
    config_type = PYRAMID.config_type

    def __getattr__(self, name: str) -> Any:
        return getattr(PYRAMID, name)

    def quantize(self, weight: torch.Tensor, spec: CodecSpec) -> QuantizedMatrix:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return PYRAMID.quantize(weight, spec)


@pytest.mark.parametrize("calls", [3, 9])
def test_interrupted_and_resumed(source: Path, artifact: Path, tmp_path: Path, calls: int) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(source, out, method=Failing(calls))
    assert not out.exists()
    events: list[Event] = []
    counting = Failing(14 - 7 * (calls // 7))  # what is left, and not one more
    quantize(source, out, method=counting, listeners=[events.append])
    assert counting.calls == 0
    assert contents(out) == contents(artifact)
    assert [event.data["index"] for event in events if event.kind == "step"] == [1, 2]


def test_finished_work_is_not_done_again(source: Path, tmp_path: Path) -> None:
    first = quantize(source, tmp_path / "out")
    assert quantize(source, tmp_path / "out", method=Failing(0)) == first


def test_killed_during_assembly(source: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("compress.quantization.run.write_artifact", die)
        quantize(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    quantize(source, tmp_path / "out", method=Failing(0))
    assert contents(tmp_path / "out") == contents(artifact)


def test_full_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for function in ("write_tensors", "write_weights"):
        with monkeypatch.context() as patched, pytest.raises(WorkspaceError, match="Free some space"):
            patched.setattr(f"compress.quantization.run.{function}", full)
            quantize(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_taken_place_is_refused_before_the_work(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UsageError, match="not empty"):
        quantize(source, tmp_path / "out", method=Failing(0))


def test_specs_of_another_model(source: Path, tmp_path: Path) -> None:
    with Workspace.open(tmp_path / "w", {}) as work, pytest.raises(ModelError, match="differ in 14 matrices"):
        quantize_checkpoint(source, tmp_path / "out", {}, PYRAMID, work, Events())


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [("LlamaModel", "LlamaForCausalLM"), ("LlamaForCausalLM", "LlamaModel")],
    ids=["prefix is added", "prefix is stripped"],
)
def test_keys_without_and_with_the_base_prefix(tmp_path: Path, saved: str, loaded: str) -> None:
    """A checkpoint of one class, declared as the other: its names are mapped to the declared class's."""
    families.save(families.build(saved, "llama", num_hidden_layers=1, tie_word_embeddings=True), tmp_path / "tiny")
    config = read_config(tmp_path / "tiny")
    (tmp_path / "tiny" / "config.json").write_text(json.dumps({**config, "architectures": [loaded]}))
    quantize(tmp_path / "tiny", tmp_path / "out")
    prefix = "model." if loaded == "LlamaForCausalLM" else ""
    name = f"{prefix}layers.0.mlp.up_proj"
    assert name in Artifact(tmp_path / "out").modules
    assert f"{name}.weight" in Checkpoint(tmp_path / "out").names()


def damage(folder: Path, change: Any) -> None:
    tensors = read_tensors(folder / WEIGHTS)
    change(tensors)
    write_tensors(folder / WEIGHTS, tensors)


def set_value(name: str, value: float) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[3] = value

    return change


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (set_value(UP, float("nan")), NumericsError, UP),
        (set_value("model.embed_tokens.weight", float("inf")), NumericsError, r"model\.embed_tokens\.weight"),
        (lambda tensors: tensors.pop(UP), ModelError, f"no tensor '{UP}'"),
        (lambda tensors: tensors.update({UP: torch.zeros(3, 3)}), ModelError, r"shape \[3, 3\]"),
        (lambda tensors: tensors.update({UP.removeprefix("model."): tensors[UP]}), ModelError, "both the parameter"),
    ],
    ids=["NaN", "infinite embedding", "missing", "wrong shape", "twice"],
)
def test_bad_weights(tmp_path: Path, change: Any, error: type[CompressError], message: str) -> None:
    folder = families.save(families.llama(num_hidden_layers=1), tmp_path / "tiny")
    damage(folder, change)
    with pytest.raises(error, match=message) as caught:
        quantize(folder, tmp_path / "out")
    assert caught.value.remedy
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["truncated", "quantized", "experts", "pickle", "no config"])
def test_bad_folders(tmp_path: Path, case: str) -> None:
    if case == "experts":
        llama4 = families.build("Llama4ForCausalLM", "llama4_text", num_hidden_layers=1, num_local_experts=2)
        folder = families.save(llama4, tmp_path / "m")
    else:
        folder = families.save(families.llama(num_hidden_layers=1), tmp_path / "m")
    weights, config = folder / WEIGHTS, folder / "config.json"
    if case == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif case == "quantized":
        data = json.loads(config.read_text())
        config.write_text(json.dumps({**data, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    elif case == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif case == "no config":
        config.unlink()
    messages = {
        "truncated": "is damaged: tensor",
        "quantized": "quant_method 'gptq'",
        "experts": "whose function is not known",
        "pickle": "save_pretrained",
        "no config": r"no config\.json",
    }
    with pytest.raises(ModelError, match=messages[case]) as caught:
        open_target(folder)
    assert caught.value.remedy


def test_damaged_unit_file_is_made_again(source: Path, artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", method=Failing(9))
    unit = tmp_path / "out-work" / "blocks" / "00000.safetensors"
    unit.write_bytes(unit.read_bytes()[:-1])
    with pytest.raises(ArtifactError):
        read_tensors(unit, ArtifactError)
    quantize(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(artifact)


MEMORY_SCRIPT = """
import sys
from pathlib import Path
import torch
from compress.codecs import codec
from compress.events import Events
from compress.quantization.allocation import uniform
from compress.quantization.run import peak_rss_bytes, quantize_checkpoint
from compress.quantization.target import open_target
from compress.workspace import Workspace
torch.set_num_threads(1)
source, out = Path(sys.argv[1]), Path(sys.argv[2])
pyramid = codec("pyramid")
target = open_target(source)
specs = uniform(target.views, pyramid, 3.0)
pyramid.quantize(torch.randn(64, 64), pyramid.spec(48)).dequantize()
before = peak_rss_bytes()
with Workspace.open(out.with_name("w"), {}) as work:
    quantize_checkpoint(source, out, specs, pyramid, work, Events())
print(peak_rss_bytes() - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A checkpoint of 64 MB, nearly all of it in tensors of 2 MB that are streamed."""
    folder = families.save(families.llama(num_hidden_layers=1), tmp_path / "m")
    tensors = read_tensors(folder / WEIGHTS)
    for index in range(32):
        tensors[f"extra.{index}"] = torch.zeros(512, 1024)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(folder), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    grown = int(run.stdout.split()[-1])
    assert (folder / WEIGHTS).stat().st_size > 64e6
    assert grown < 40e6
