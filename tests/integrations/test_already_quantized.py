"""A model that is quantized already is refused by its method's name, wherever it could be an input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import compress
from compress.cli.main import main
from compress.errors import ModelError
from tests import families
from tests.tiny_models import write_llama, write_text

METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "group_size": 128, "desc_act": False},
    "awq": {"bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "compressed-tensors": {"format": "pack-quantized", "config_groups": {}},
    "fp8": {"weight_block_size": [128, 128]},
    "compress": {},
}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def quantized(method: str, tmp_path: Path) -> Path:
    """A model whose config says so; what weights it has is not looked at."""
    folder = write_llama(tmp_path / "model", write_text(tmp_path))
    if method == "compress":
        return families.save(compress.quantize(folder), tmp_path / "packed")
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": method, **METHODS[method]}}
    path.write_text(json.dumps(config))
    return folder


COMMANDS = (
    "quantize {} --out out",
    "plan quantize {} --bits 3.25",
    "plan transform {} --data text:text.txt --bits 4",
    "distill --student {} --out out --data text:text.txt --loss cross_entropy",
)


@pytest.mark.parametrize("words", COMMANDS)
def test_on_the_command_line(
    quantized: Path, method: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    found = CliRunner().invoke(main, words.format(quantized).split())
    assert found.exit_code in (1, 2)
    assert f"is already quantized (quant_method '{method}')" in " ".join(found.stderr.split())
    assert str(quantized) in found.stderr.replace("\n", "")
    assert set(tmp_path.iterdir()) == before


def test_in_python(quantized: Path, method: str, tmp_path: Path) -> None:
    refused = rf"already quantized \(quant_method '{method}'\)"
    with pytest.raises(ModelError, match=refused):
        compress.quantize(quantized)
    with pytest.raises(ModelError, match=refused):
        compress.transform(quantized, "hadamard")
    with pytest.raises(ModelError, match=refused):
        compress.distill(quantized, out=tmp_path / "out", data=f"text:{tmp_path / 'text.txt'}")
    assert not (tmp_path / "out").exists()


def test_in_memory() -> None:
    model = compress.quantize(families.llama(num_hidden_layers=1))
    with pytest.raises(ModelError, match="already quantized"):
        compress.quantize(model)
