"""Tiny models with random weights, plain and quantized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
)

import compress
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
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
VISION = {**VISION, "image_size": 16, "patch_size": 4}
# rows of the convolutions' matrices are 27, 8 and 72 weights long
CONVOLUTIONS = {"embedding_size": 8, "hidden_sizes": [16], "depths": [1], "layer_type": "basic"}
POSITIONS = 128


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


def gpt2() -> PreTrainedModel:
    """With a table of positions, and weights that are stored transposed."""
    sizes = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": POSITIONS}
    return integers(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)))


def opt() -> PreTrainedModel:
    """With a table of positions that begins at its third row."""
    sizes = {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": POSITIONS}
    return integers(OPTForCausalLM(OPTConfig(**sizes)))


def vit() -> PreTrainedModel:
    return integers(ViTForImageClassification(ViTConfig(**VISION, num_labels=5)))


def resnet() -> PreTrainedModel:
    return integers(ResNetForImageClassification(ResNetConfig(**CONVOLUTIONS, num_labels=5)))


def backbone() -> PreTrainedModel:
    """Of values from a table, which are rounded."""
    return compress.quantize(ResNetModel(ResNetConfig(**CONVOLUTIONS)).eval(), codec="nf4:block=32")


def llava() -> PreTrainedModel:
    """A language model and a tower that are both quantized."""
    text = {**GROUPED, "vocab_size": 128, "tie_word_embeddings": True}
    parts = {"text_config": LlamaConfig(**text), "vision_config": CLIPVisionConfig(**VISION)}
    model = LlavaForConditionalGeneration(LlavaConfig(**parts, image_token_index=127))
    return integers(model, towers=True)


def integers(model: PreTrainedModel, **options: bool) -> PreTrainedModel:
    return compress.quantize(model.eval(), bits=4.9, codec="integer:group=16", **options)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mistral": mistral,
    "bert": bert,
    "gpt2": gpt2,
    "opt": opt,
    "vit": vit,
    "resnet": resnet,
    "backbone": backbone,
    "llava": llava,
}
