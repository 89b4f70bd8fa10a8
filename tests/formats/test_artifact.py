"""Opening, listing and verifying artifacts; every byte that is changed is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModel

import compress
from compress.codecs import codec
from compress.errors import ArtifactError, CompressError
from compress.events import Events
from compress.formats.companions import companions
from compress.formats.inspect import inspect_artifact
from compress.formats.native import Artifact
from compress.formats.sizes import model_size
from compress.modeling.io import WEIGHTS
from compress.quantization.allocation import uniform
from compress.quantization.run import quantize_checkpoint
from compress.quantization.target import open_target
from compress.workspace import Workspace
from tests import families


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    source = families.save(families.bert(), folder / "bert")
    target = open_target(source)
    pyramid = codec("pyramid")
    with Workspace.open(folder / "work", {}) as work:
        widths = uniform(target.views, pyramid, 3.25)
        quantize_checkpoint(source, folder / "out", widths, pyramid, work, Events(), bits_target=3.25)
    return folder / "out"


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


def test_inspect(artifact: Path) -> None:
    found = inspect_artifact(artifact)
    report = json.loads((artifact / "report.json").read_text())
    assert len(found.rows) == 12
    assert [row.name for row in found.rows] == [row["name"] for row in report["matrices"]]
    for row, expected in zip(found.rows, report["matrices"], strict=True):
        assert list(row.shape) == expected["shape"]
        assert row.bits_per_weight == expected["bits_per_weight"]
        assert row.relative_error == expected["relative_error"]
        assert row.sqnr_db == expected["sqnr_db"]
        assert row.codec == "pyramid"
    assert found.bits_per_weight == report["bits_per_weight"]
    assert found.model_bits_per_weight == report["model_bits_per_weight"]
    assert found.model_bytes == report["model_bytes"]
    assert found.parameters == report["parameters"]
    assert found.verified == len(list(artifact.iterdir())) - 1
    assert "cls.predictions.transform.dense" in found.ignore


@pytest.mark.parametrize(("architecture", "family"), [("LlamaForCausalLM", "llama"), ("BertForMaskedLM", "bert")])
def test_artifact_of_save_pretrained(tmp_path: Path, architecture: str, family: str) -> None:
    """Saved whole, and as the bare backbone, which the names in quantization_config do not quite fit any more."""
    model = compress.quantize(families.build(architecture, family), bits=3.3)
    rate = model.config.quantization_config.bits_per_weight
    assert model.config.quantization_config.modules
    families.save(model, tmp_path / "whole")
    families.save(AutoModel.from_pretrained(tmp_path / "whole"), tmp_path / "bare")
    for folder in (tmp_path / "whole", tmp_path / "bare"):
        found, size = inspect_artifact(folder), model_size(folder)
        assert found.verified == 0
        assert len(found.rows) == (14 if family == "llama" else 12)
        assert found.rows[0].relative_error is None
        assert found.bits_per_weight == size.bits_per_weight == rate
        assert found.model_bits_per_weight == size.model_bits_per_weight == 8 * size.bytes / size.parameters


def test_every_changed_file_is_found(copy: Path) -> None:
    for path in sorted(copy.iterdir()):
        if path.name == "compress.json":
            continue
        data = path.read_bytes()
        path.write_bytes(bytes([data[-1] ^ 1]).join([data[:-1], b""]))
        with pytest.raises(ArtifactError, match=path.name):
            open_and_verify(copy)
        path.write_bytes(data)
    assert Artifact(copy).verify() > 0


def open_and_verify(folder: Path) -> None:
    """Some changes are found by opening already; those of config.json may make it another error of ours."""
    try:
        Artifact(folder).verify()
    except ArtifactError:
        raise
    except CompressError as error:
        raise ArtifactError(str(error)) from error


def test_missing_file(copy: Path) -> None:
    (copy / "README.md").unlink()
    with pytest.raises(ArtifactError, match=r"README\.md' is listed"):
        inspect_artifact(copy)


def test_checksums_that_lead_outside(copy: Path) -> None:
    sums = json.loads((copy / "compress.json").read_text())
    sums["files"]["../../etc/passwd"] = {"bytes": 1, "sha256": "0"}
    (copy / "compress.json").write_text(json.dumps(sums))
    with pytest.raises(ArtifactError, match=r"compress\.json' is damaged: '\.\./\.\./etc/passwd'"):
        inspect_artifact(copy)


@pytest.mark.parametrize("text", ["{", "[]", '{"files": {"a": {}}}'])
def test_damaged_checksums(copy: Path, text: str) -> None:
    (copy / "compress.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"compress\.json' is damaged"):
        inspect_artifact(copy)


def test_truncated_weights(copy: Path) -> None:
    (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="is damaged"):
        Artifact(copy)


def test_not_an_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no folder"):
        Artifact(tmp_path / "none")
    families.save(families.llama(num_hidden_layers=1), tmp_path)
    with pytest.raises(ArtifactError, match="is not quantized"):
        Artifact(tmp_path)


def test_width_that_does_not_fit_the_payload(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["default"]["width"] = 30
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"copy' in matrix '.*bytes of int8; the payload is \[\d+\] of I8"):
        Artifact(copy)


COMPANIONS = [
    "1_Pooling/config.json",
    "LICENSE",
    "additional_chat_templates/tools.jinja",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "modules.json",
    "preprocessor_config.json",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
]
OTHERS = [
    "config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "README.md", ".git/config",
    "onnx/model.onnx", ".hidden.model", "notes.txt", "data/train.json", "work/manifest.json", "out/tokenizer.json",
    "checkpoint-10/optimizer.pt", "modeling_new.py", "trainer_state.json",
]  # fmt: skip


def touch(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).touch()


def test_companions_are_what_belongs_to_the_model(tmp_path: Path) -> None:
    touch(tmp_path, COMPANIONS + OTHERS)
    assert [path.relative_to(tmp_path).as_posix() for path in companions(tmp_path)] == COMPANIONS


@pytest.mark.parametrize("config", ["config.json", "tokenizer_config.json"])
def test_code_is_copied_where_a_configuration_names_it(tmp_path: Path, config: str) -> None:
    touch(tmp_path, ["modeling_new.py", "parts.py", "scripts/train.py"])
    (tmp_path / config).write_text('{"auto_map": {"AutoModel": "modeling_new.NewModel"}}')
    assert {path.name for path in companions(tmp_path)} - {config} == {"modeling_new.py", "parts.py"}
