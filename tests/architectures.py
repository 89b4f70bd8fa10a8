"""A tiny random model of each architecture that is claimed to work, and what is claimed of it.

`TABLE` is what `tests/test_architectures.py` proves, cell by cell, and what the table in `docs/models.md` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests import families

PIXELS = {**families.SIZES, "image_size": 16, "patch_size": 4}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 96,
    "num_mel_bins": 8,
    "max_source_positions": 30,
    "max_target_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}


@dataclass(frozen=True)
class Architecture:
    """`maps`: matrices of one model with two blocks (or as said), counted by hand. `calibrated`, `onnx`: whether data
    can be used, and an export; a text is why not. `part`: what of it goes through both. `title` is how a reader knows
    it."""

    title: str
    cls: str
    family: str
    changes: dict[str, Any]
    maps: int
    calibrated: bool | str = True
    onnx: bool | str = True
    part: str = "yes"

    def config(self) -> transformers.PreTrainedConfig:
        if self.cls == "LlavaForConditionalGeneration":
            parts = {"text_config": families.config("llama"), "vision_config": vision("clip_vision_model")}
            return transformers.LlavaConfig(**parts, image_token_index=95)
        if self.cls == "Gemma3ForConditionalGeneration":
            text = families.config("gemma3_text", head_dim=8)
            parts = {"text_config": text.to_dict(), "vision_config": vision("siglip_vision_model").to_dict()}
            return transformers.Gemma3Config(**parts, mm_tokens_per_image=4, image_token_index=95)
        return transformers.AutoConfig.for_model(self.family, **self.changes)

    def build(self) -> transformers.PreTrainedModel:
        """With random weights of a trained model's size, always the same."""
        torch.manual_seed(0)
        model: transformers.PreTrainedModel = getattr(transformers, self.cls)(self.config())
        with torch.no_grad():
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.2)
        return model.eval()


def vision(family: str) -> transformers.PreTrainedConfig:
    return transformers.AutoConfig.for_model(family, **PIXELS)


ENCODER_DECODER = "encoder-decoders are not run block by block yet"
EXPERTS = "fused experts are not exported"
DECODER = families.DECODER
MIXTURE = {**DECODER, **families.EXPERTS}

TABLE = [
    Architecture("Llama", "LlamaForCausalLM", "llama", DECODER, 14),
    Architecture("Mistral", "MistralForCausalLM", "mistral", DECODER, 14),
    Architecture("Qwen 2", "Qwen2ForCausalLM", "qwen2", DECODER, 14),
    Architecture("Qwen 3", "Qwen3ForCausalLM", "qwen3", {**DECODER, "head_dim": 8}, 14),
    Architecture("Gemma", "GemmaForCausalLM", "gemma", {**DECODER, "head_dim": 8}, 14),
    Architecture("Gemma 2", "Gemma2ForCausalLM", "gemma2", {**DECODER, "head_dim": 8}, 14),
    Architecture("Gemma 3", "Gemma3ForCausalLM", "gemma3_text", {**DECODER, "head_dim": 8}, 14),
    Architecture("Phi", "PhiForCausalLM", "phi", {**DECODER, "num_key_value_heads": 4}, 12),
    Architecture("Phi 3", "Phi3ForCausalLM", "phi3", {**DECODER, "pad_token_id": 0}, 8),
    Architecture(
        "GPT-2",
        "GPT2LMHeadModel",
        "gpt2",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64, "bos_token_id": 1}
        | {"eos_token_id": 2},
        8,
    ),
    Architecture(
        "OPT",
        "OPTForCausalLM",
        "opt",
        {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
        | {"max_position_embeddings": 64, "word_embed_proj_dim": 32},
        12,
    ),
    Architecture("Falcon", "FalconForCausalLM", "falcon", families.SIZES, 8),
    Architecture("Mixtral", "MixtralForCausalLM", "mixtral", MIXTURE, 2 * (4 + 8), onnx=EXPERTS),
    Architecture(
        "Qwen 2 MoE",
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        {**MIXTURE, "shared_expert_intermediate_size": 48},
        2 * (4 + 3 + 8),
        onnx=EXPERTS,
    ),
    Architecture("Qwen 3 MoE", "Qwen3MoeForCausalLM", "qwen3_moe", {**MIXTURE, "head_dim": 8}, 24, onnx=EXPERTS),
    Architecture(
        "GPT-OSS",
        "GptOssForCausalLM",
        "gpt_oss",
        {**MIXTURE, "head_dim": 8, "eos_token_id": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        24,
        onnx=EXPERTS,
    ),
    Architecture("BERT", "BertForSequenceClassification", "bert", families.ENCODER, 12),
    Architecture(
        "T5",
        "T5ForConditionalGeneration",
        "t5",
        {**T5, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0},
        2 * 7 + 2 * 11,
        calibrated=ENCODER_DECODER,
        onnx=ENCODER_DECODER,
    ),
    Architecture(
        "Whisper",
        "WhisperForConditionalGeneration",
        "whisper",
        WHISPER,
        2 * 6 + 2 * 10,
        calibrated=ENCODER_DECODER,
        onnx=ENCODER_DECODER,
    ),
    Architecture("ViT", "ViTForImageClassification", "vit", {**PIXELS, "num_labels": 5}, 12),
    Architecture(
        "ResNet",
        "ResNetForImageClassification",
        "resnet",
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 1], "layer_type": "basic", "num_labels": 5},
        3 + 2 + 3,
    ),
    Architecture(
        "ConvNeXt",
        "ConvNextForImageClassification",
        "convnext",
        {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 2, 1], "image_size": 32, "num_labels": 5},
        2 * 5 + 3,
    ),
    Architecture("LLaVA", "LlavaForConditionalGeneration", "llava", {}, 14, part="language part"),
    Architecture("Gemma 3, images", "Gemma3ForConditionalGeneration", "gemma3", {}, 14, part="language part"),
]


def inputs(model: transformers.PreTrainedModel, rows: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """A batch of what the model takes."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (rows, 12), generator=generator)
    match model.main_input_name:
        case "pixel_values":
            side = model.config.to_dict().get("image_size", 32)
            return {"pixel_values": torch.randn(rows, 3, side, side, generator=generator)}
        case "input_features":
            return {"input_features": torch.randn(rows, 8, 60, generator=generator), "decoder_input_ids": ids}
    return {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}


def logits(model: transformers.PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch).logits
    return found


def rows() -> Iterator[str]:
    """The table of docs/models.md."""

    def cell(each: Architecture, claim: bool | str) -> str:
        return each.part if claim is True else "no"

    yield "| model | `model_type` | plan, quantize, load, run | with data | ONNX |"
    yield "|---|---|---|---|---|"
    for each in TABLE:
        yield f"| {each.title} | `{each.family}` | yes | {cell(each, each.calibrated)} | {cell(each, each.onnx)} |"
