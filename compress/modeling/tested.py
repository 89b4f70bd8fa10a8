"""The architectures that the tests cover, by `model_type`: most from a plan to a loaded artifact (`docs/models.md` has
which), the others, of the kind of Llama, through transforms and block by block.

Others are quantized by their structure too, and the plan then says what it took for granted.
"""

from __future__ import annotations

TESTED = frozenset(
    {
        "bert",
        "cohere",
        "convnext",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "falcon",
        "gpt2",
        "gpt_oss",
        "granite",
        "llama",
        "llava",
        "mistral",
        "mixtral",
        "olmo2",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "resnet",
        "smollm3",
        "stablelm",
        "t5",
        "vit",
        "whisper",
    }
)
