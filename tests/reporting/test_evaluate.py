"""The verb `evaluate` with quantized activations, keys and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import BertConfig, BertModel

import compress
from compress.codecs.dynamic import GroupQuantizer, TokenQuantizer
from compress.data import text_source, tokenize
from compress.data.tokenizer import train_byte_bpe
from compress.errors import UsageError
from compress.modeling.loading import load_tokenizer
from compress.quantization.dynamic import Dynamic, dynamic_quantization
from compress.reporting.evaluate import evaluate
from tests.tiny_models import write_llama, write_text


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model that attends to what it reads, as one with small weights does not, and a text."""
    folder = tmp_path_factory.mktemp("eval")
    text = write_text(folder)
    model = compress.load(str(write_llama(folder / "small", text, hidden=32, layers=2)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim == 2 else 1)
    model.save_pretrained(folder / "model")
    load_tokenizer(str(folder / "small")).save_pretrained(folder / "model")
    return {"model": str(folder / "model"), "data": f"text:{text}", "context": 16, "limit": 512}


def test_figures_are_those_of_a_model_that_rounds(asked: dict[str, Any]) -> None:
    figures = evaluate(**asked, reference=asked["model"], activations=4, kv=3, kv_group=4, mix_keys=False)
    plain = evaluate(**asked)
    model = compress.load(asked["model"])
    ids, _ = tokenize(text_source(asked["data"]), load_tokenizer(asked["model"]), 512).rows(16, 512)
    with torch.no_grad():
        reference = model(ids).logits[:, :-1]
        with dynamic_quantization(model, Dynamic(TokenQuantizer(4), GroupQuantizer(3, 4), mix_keys=False)):
            logits = model(ids).logits[:, :-1]
    nll = functional.cross_entropy(logits.double().flatten(0, 1), ids[:, 1:].flatten())
    kl = functional.kl_div(*(x.double().log_softmax(-1).flatten(0, 1) for x in (logits, reference)), None, None,
                           "batchmean", log_target=True)  # fmt: skip
    assert figures["nll"] == pytest.approx(float(nll), rel=1e-5)
    assert figures["kl_divergence"] == pytest.approx(float(kl), rel=1e-4)
    assert figures["kl_divergence"] > 1e-3
    assert figures["reference_perplexity"] == pytest.approx(plain["perplexity"], rel=1e-6)
    said = {"activations": 4, "kv": 3, "kv_group": 4, "mix_keys": False}
    assert figures.items() >= said.items() and not plain.keys() & said.keys()


def test_fewer_bits_more_divergence(asked: dict[str, Any]) -> None:
    def divergence(**bits: int) -> float:
        return float(evaluate(**asked, reference=asked["model"], **bits)["kl_divergence"])

    assert 0 == divergence() < divergence(activations=8) < divergence(activations=4) < divergence(activations=3)
    assert 0 < divergence(kv=8) < divergence(kv=4) < divergence(kv=2)
    assert divergence(activations=4) < divergence(activations=4, kv=2)


def test_an_encoder(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\nshort\nsomewhat longer than the first\nand a third one here\n")
    data = f"csv:{tmp_path / 'rows.csv'}#text"
    tokenizer = train_byte_bpe(text_source(data), 270, 32)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=270, initializer_range=0.3, **sizes)).eval()
    reference = BertModel(model.config).eval()
    reference.load_state_dict(model.state_dict())
    same: dict[str, Any] = {"data": data, "reference": reference, "tokenizer": tokenizer, "context": 32}
    figures = evaluate(model, **same, activations=4)
    assert 0.5 < figures["cosine"] < 0.9999 and figures["activations"] == 4
    assert evaluate(model, **same)["cosine"] == pytest.approx(1, abs=1e-6)
    with pytest.raises(UsageError, match="no decoder"):
        evaluate(model, **same, kv=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": 16}, "2 to 8 bits"),
        ({"kv": 1}, "2 to 8 bits"),
        ({"kv": 4, "kv_group": 0}, "at least 1"),
        ({"kv_group": 8}, "with kv"),
    ],
)
def test_what_cannot_be(asked: dict[str, Any], options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(**asked, **options)


def test_a_model_that_is_its_own_reference(asked: dict[str, Any]) -> None:
    model = compress.load(asked["model"])
    same = {**asked, "model": model, "reference": model, "tokenizer": load_tokenizer(asked["model"])}
    assert evaluate(**same)["kl_divergence"] == 0
    with pytest.raises(UsageError, match="Pass a copy"):
        evaluate(**same, activations=8)
