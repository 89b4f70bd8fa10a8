"""Tiny random models of each supported family, for all tests. The same arguments give the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
DECODER = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64}
ENCODER = {**SIZES, "max_position_embeddings": 64}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2}


def config(family: str, **changes: Any) -> transformers.PreTrainedConfig:
    """The config of a tiny model of `family` ("llama", "bert", ...); `changes` override sizes."""
    mixtures = {name: {**DECODER, **EXPERTS} for name in ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")}
    sizes = {"bert": ENCODER, "clip_vision_model": SIZES, **mixtures}
    return transformers.AutoConfig.for_model(family, **{**sizes.get(family, DECODER), **changes})


def build(architecture: str, family: str, **changes: Any) -> transformers.PreTrainedModel:
    """A model of class `architecture` with random weights of a trained model's size, in eval mode."""
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config(family, **changes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def llama(**changes: Any) -> transformers.PreTrainedModel:
    return build("LlamaForCausalLM", "llama", **changes)


def bert(architecture: str = "BertForMaskedLM", **changes: Any) -> transformers.PreTrainedModel:
    return build(architecture, "bert", **changes)


def save(model: transformers.PreTrainedModel, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def token_ids(length: int = 12, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 96, (batch, length), generator=generator)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits, or the last hidden state of a model without a head."""
    with torch.no_grad():
        return model(ids)[0]
