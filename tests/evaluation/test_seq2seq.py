"""The figures of an encoder with a decoder against the model's own loss on labels, row by row."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from compress.data import text_source, tokenize
from compress.data.tokenizer import train_byte_bpe
from compress.errors import DataError, ModelError
from compress.evaluation.evaluate import evaluate
from compress.evaluation.seq2seq import evaluate_seq2seq
from compress.quantization.data import calibration_batches
from tests.tiny_models import write_text

VOCABULARY = 290
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
BART = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64,
}  # fmt: skip


def made(family: str, seed: int, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    model: PreTrainedModel
    if family == "t5":
        model = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **{**T5, **changes}))
    else:
        model = BartForConditionalGeneration(BartConfig(vocab_size=VOCABULARY, **{**BART, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("context", [12, 13])
def test_figures_are_their_definitions(family: str, context: int) -> None:
    """The model makes the decoder's input of labels by itself, and its loss is the mean over their tokens."""
    model, reference = made(family, 0), made(family, 1)
    ids = torch.randint(3, VOCABULARY, (5, context), generator=torch.Generator().manual_seed(2))
    sizes = torch.randint(1, 5, (5, context), generator=torch.Generator().manual_seed(3))
    got = evaluate_seq2seq(model, ids, sizes, reference, batch_tokens=30)
    half = context // 2
    losses, reference_losses, kl, same = [], [], [], []
    with torch.no_grad():
        for row in ids:
            source, target = row[None, :half], row[None, half:]
            outputs = [one(input_ids=source, labels=target) for one in (model, reference)]
            losses.append(float(outputs[0].loss))
            reference_losses.append(float(outputs[1].loss))
            q, p = (F.log_softmax(one.logits[0].double(), -1) for one in outputs)
            kl.append(float((p.exp() * (p - q)).sum(-1).mean()))
            same.append(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert got["tokens"] == 5 * (context - half)
    nll = sum(losses) / 5
    assert got["nll"] == pytest.approx(nll, rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(nll), rel=1e-5)
    assert got["reference_perplexity"] == pytest.approx(math.exp(sum(reference_losses) / 5), rel=1e-5)
    assert got["kl_divergence"] == pytest.approx(sum(kl) / 5, rel=1e-4)
    assert got["top1_agreement"] == pytest.approx(sum(same) / 5)
    bits = nll * 5 * (context - half) / math.log(2) / int(sizes[:, half:].sum())
    assert got["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_text_through_the_verb_and_calibration(family: str, tmp_path: Path) -> None:
    spec = f"text:{write_text(tmp_path)}"
    tokenizer = train_byte_bpe(text_source(spec), VOCABULARY, 64)
    model = made(family, 0)
    ids, sizes = tokenize(text_source(spec), tokenizer, 400).rows(20, 400)
    got = evaluate(model, reference=made(family, 1), data=spec, tokenizer=tokenizer, context=20, limit=400)
    wanted = evaluate_seq2seq(model, ids, sizes, made(family, 1))
    assert got["context"] == 20 and {name: got[name] for name in wanted} == wanted
    batches = calibration_batches(model, spec, lambda: tokenizer, rows=5, context=21, seed=0)
    rows = torch.cat([torch.cat([batch["input_ids"], batch["decoder_input_ids"]], 1) for batch in batches])
    start = 0 if family == "t5" else 2
    assert rows.shape == (5, 21) and bool((rows[:, 10] == start).all())
    text = tokenize(text_source(spec), tokenizer).ids.tolist()
    for row in rows.tolist():
        part = row[:10], row[11:]
        places = [place for place in range(len(text)) if text[place : place + 10] == part[0]]
        assert any(text[place + 10 : place + 20] == part[1] for place in places)


def test_batches_as_they_are() -> None:
    model = made("t5", 0)
    ids = torch.arange(3, 15).view(2, 6)
    given = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :2]}]
    (found,) = calibration_batches(model, given, lambda: None, rows=1, context=None, seed=0)  # type: ignore[arg-type]
    assert found.keys() == given[0].keys() and all(found[name] is given[0][name] for name in found)
    for broken, message in (
        ({"input_ids": ids}, "'decoder_input_ids'"),
        ({**given[0], "input_ids": ids + 999}, "know"),
    ):
        with pytest.raises(DataError, match=message):
            calibration_batches(model, [broken], lambda: None, rows=1, context=None, seed=0)  # type: ignore[arg-type]


def test_no_start_token() -> None:
    model = made("t5", 0, decoder_start_token_id=None)
    ids = torch.arange(3, 15).view(2, 6)
    with pytest.raises(ModelError, match="names no decoder_start_token_id") as caught:
        evaluate_seq2seq(model, ids, torch.ones_like(ids))
    assert "padding" in caught.value.remedy
