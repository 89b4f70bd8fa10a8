"""Tiny models with random weights, plain and quantized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from compress.codecs import codec
from compress.exporters import ExportReport
from compress.modeling.structure import matrices
from compress.quantization.modules import PackedLinear

# times the hidden width more than the 8,192 elements up to which the exporter folds a transposed copy
VOCABULARY = 160
# no multiple of 16 divides the inner width, so that the last group of a row is padded
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}


@dataclass
class Exported:
    model: PreTrainedModel
    folder: Path
    report: ExportReport


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """The model with norms and biases that are not ones and zeros, in eval mode."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def pack(model: PreTrainedModel, wide: str = "") -> PreTrainedModel:
    """Quantize the blocks' matrices at 3.25 bits a weight, and the one called `wide` with so many pulses that some
    integer exceeds 7."""
    for view in matrices(model):
        linear = model.get_submodule(view.module)
        assert isinstance(linear, torch.nn.Linear)
        rounder = codec("pyramid", max=127 if view.name == wide else 7)
        if view.name == wide:
            linear.weight.data[:, ::16] *= 30
        matrix = rounder.quantize(linear.weight, rounder.spec(64 if view.name == wide else 52))
        model.set_submodule(view.module, PackedLinear.from_matrix(linear, matrix))
    return model


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**GROUPED, "num_hidden_layers": 2}, tie_word_embeddings=True))


def qwen2() -> PreTrainedModel:
    return pack(Qwen2ForCausalLM(Qwen2Config(**GROUPED)), wide="model.layers.0.mlp.down_proj")


def qwen3() -> PreTrainedModel:
    return pack(Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=32)))


def mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=4))


def bert() -> PreTrainedModel:
    return pack(BertModel(BertConfig(**SIZES)))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mistral": mistral,
    "bert": bert,
}
