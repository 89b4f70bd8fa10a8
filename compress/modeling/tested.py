"""The architectures that the tests take from a plan to a loaded artifact, by `model_type`.

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
