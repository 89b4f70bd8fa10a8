"""An artifact that the tests of this folder share, with the logits of the model that was written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from tests import families


@dataclass(frozen=True)
class Artifact:
    """A folder, and what the model in it computes for `ids`."""

    folder: Path
    ids: torch.Tensor
    logits: torch.Tensor

    def load(self, **options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder, **options)


def write(model: Any, folder: Path) -> Artifact:
    ids = families.token_ids()
    logits = families.logits(model, ids)
    return Artifact(families.save(model, folder), ids, logits)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A Llama with a tied head, in `half_pyramid` as it is by default."""
    model = compress.quantize(families.llama(tie_word_embeddings=True))
    return write(model, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A Llama of which both sides of every matrix are mixed, which leaves the head untied."""
    model = compress.quantize(families.llama(tie_word_embeddings=True), transform="hadamard")
    return write(model, tmp_path_factory.mktemp("mixed"))
