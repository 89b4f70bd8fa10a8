"""Artifacts written with this version of transformers, read with another one: the same logits, there and back.

`pytest --transformers-overlay DIR` names a folder of `pip install --target DIR transformers==VERSION`, which a child
process puts in front of its path; `make test-5.17` makes one. The oldest version that is supported is the one to take.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import compress
from compress.codecs.registry import codec_names
from tests import families

MODELS: dict[str, dict[str, Any]] = {
    "llama-tied": {"architecture": "LlamaForCausalLM", "family": "llama", "tie_word_embeddings": True},
    "llama-untied": {"architecture": "LlamaForCausalLM", "family": "llama", "tie_word_embeddings": False},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "family": "qwen3"},
    "bert": {"architecture": "BertForMaskedLM", "family": "bert"},
}
CASES = [(model, codec, "none") for model in MODELS for codec in codec_names()]
CASES += [(model, "half_pyramid", "hadamard") for model in MODELS]
MODELS |= {
    "mixtral": {"architecture": "MixtralForCausalLM", "family": "mixtral"},
    "gpt_oss": {
        "architecture": "GptOssForCausalLM",
        "family": "gpt_oss",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "gpt2": {"architecture": "GPT2LMHeadModel", "family": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4},
}
CASES += [(model, "half_pyramid", "none") for model in ("mixtral", "gpt_oss", "gpt2")]
MODELS["gemma3"] = {"architecture": "Gemma3ForCausalLM", "family": "gemma3_text", "head_dim": 8, "pad_token_id": 0}
CASES += [(model, "integer", "tables") for model in ("llama-tied", "llama-untied", "bert", "gpt2", "gemma3")]
"""Codec and transform; "tables": no transform, and embedding and head of 4 bits."""

CHILD = """
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import save_file
import compress
from compress.quantization.modules import packed_modules
work, ids = Path(sys.argv[1]), torch.tensor(json.loads(sys.argv[2]))
found = {}
with torch.no_grad():
    for folder in sorted((work / "written").iterdir()):
        model = compress.load(folder)
        assert packed_modules(model)
        found[folder.name] = model(ids)[0]
        model.save_pretrained(work / "again" / folder.name)
        plain = model.dequantize()
        assert not packed_modules(plain) and "quantization_config" not in plain.config.to_dict()
        found[folder.name + ".plain"] = plain(ids)[0]
save_file(found, work / "logits.safetensors")
print(transformers.__version__)
"""


@dataclass(frozen=True)
class Crossing:
    """Logits by this version, before and after the folder went through the other version, and those of the other."""

    here: dict[str, torch.Tensor]
    there: dict[str, torch.Tensor]
    again: dict[str, torch.Tensor]
    version: str


def name_of(model: str, codec: str, transform: str) -> str:
    return f"{model}-{codec}-{transform}"


@pytest.fixture(scope="module")
def overlay(request: pytest.FixtureRequest) -> Path:
    folder: Path | None = request.config.getoption("--transformers-overlay")
    if folder is None:
        pytest.skip("needs another version of transformers: pytest --transformers-overlay DIR")
    return folder.resolve()


@pytest.fixture(scope="module")
def crossing(overlay: Path, tmp_path_factory: pytest.TempPathFactory) -> Crossing:
    work, ids = tmp_path_factory.mktemp("crossing"), families.token_ids()
    here = {}
    options: dict[str, Any]
    for model, codec, transform in CASES:
        name, options = name_of(model, codec, transform), {"codec": codec, "transform": transform}
        if transform == "tables":
            options |= {"transform": "none", "embedding_bits": 4, "head_bits": 4}
        packed = compress.quantize(families.build(**MODELS[model]), **options)
        here[name] = families.logits(packed, ids)
        families.save(packed, work / "written" / name)
    run = subprocess.run(
        [sys.executable, "-c", CHILD, str(work), json.dumps(ids.tolist())],
        env={**os.environ, "PYTHONPATH": str(overlay)},
        cwd=work,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    again = {name: families.logits(compress.load(work / "again" / name), ids) for name in here}
    return Crossing(here, load_file(work / "logits.safetensors"), again, run.stdout.strip())


def test_the_other_version_is_another(crossing: Crossing, overlay: Path) -> None:
    assert crossing.version != transformers.__version__
    assert (overlay / f"transformers-{crossing.version}.dist-info").is_dir()


@pytest.mark.parametrize("case", CASES, ids=lambda case: name_of(*case))
def test_same_logits(crossing: Crossing, case: tuple[str, str, str]) -> None:
    """To the bit: both versions compute these architectures with the same operations in the same order."""
    name = name_of(*case)
    assert torch.equal(crossing.there[name], crossing.here[name])
    assert torch.equal(crossing.again[name], crossing.here[name])
    # decoded weights are multiplied in another order than packed ones
    spread = float(crossing.here[name].abs().max())
    torch.testing.assert_close(crossing.there[name + ".plain"], crossing.here[name], rtol=0, atol=1e-4 * spread)
