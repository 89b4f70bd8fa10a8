"""A text, and tiny Llamas with a tokenizer of that text: what a whole run needs, made in a second."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compress.data.sources import text_source
from compress.data.tokenizer import train_byte_bpe

VOCABULARY = 300
WORDS = ["def", "return", "value", "if", "else", "for", "in", "range", "print", "self", "None", "total", "item"]


def write_text(folder: Path, words: int = 4000) -> Path:
    """A text file of common words, always the same."""
    draw = random.Random(0)
    path = folder / "text.txt"
    path.write_text(" ".join(draw.choice(WORDS) + ("\n" if draw.random() < 0.1 else "") for _ in range(words)))
    return path


def write_llama(
    folder: Path, text: Path, hidden: int = 32, layers: int = 1, seed: int = 0, vocabulary: int = VOCABULARY
) -> Path:
    """A random Llama of `hidden` x `layers` with a tokenizer trained on `text`, saved in bfloat16."""
    tokenizer = train_byte_bpe(text_source(f"text:{text}"), vocabulary, 64)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
