"""The embeddings' cosine against sentence-by-sentence arithmetic without padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from compress.data import text_source
from compress.data.tokenizer import train_byte_bpe
from compress.evaluation.encoder import evaluate_encoder


def tiny(seed: int) -> BertModel:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=270, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return BertModel(config).eval()


def test_cosine_is_that_of_single_sentences(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text\nshort\nsomewhat longer than the first\nand a third one here\n")
    source = text_source(f"csv:{path}#text")
    tokenizer = train_byte_bpe(source, 270, 32)
    model, reference = tiny(0), tiny(1)
    got = evaluate_encoder(model, reference, tokenizer, source, context=32, batch=2)
    cosines = []
    with torch.no_grad():
        for document in source.documents():
            ids = torch.tensor([tokenizer(document.text)["input_ids"]])
            a, b = (m(ids).last_hidden_state[0].mean(0).double() for m in (model, reference))
            cosines.append(float(a @ b / (a.norm() * b.norm())))
    assert got["documents"] == 3
    assert got["cosine"] == pytest.approx(sum(cosines) / 3, abs=1e-6)
    assert evaluate_encoder(model, model, tokenizer, source, context=32)["cosine"] == pytest.approx(1.0, abs=1e-6)
