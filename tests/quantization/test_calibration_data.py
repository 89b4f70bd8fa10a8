"""What may be named as calibration data, and what is said of anything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from compress.data import text_source
from compress.data.calibration import calibration_rows, encoder_batches
from compress.data.tokenizer import train_byte_bpe
from compress.errors import DataError, UsageError
from compress.quantization.data import calibration_batches, row_length
from tests import families
from tests.tiny_models import write_text

SIZES = {"rows": 4, "context": 16, "seed": 3}


def no_tokenizer() -> PreTrainedTokenizerBase:
    raise AssertionError("ids need no tokenizer")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def test_rows_of_ids() -> None:
    ids = families.token_ids(10, 300)
    batches = calibration_batches(families.llama(), ids, no_tokenizer, **SIZES)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), ids)
    assert len(batches) == 2


def test_batches_as_they_are() -> None:
    ids = families.token_ids(10, 3)
    given = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {"input_ids": ids[:, :4]}]
    found = calibration_batches(families.bert(), given, no_tokenizer, **SIZES)
    assert [batch.keys() for batch in found] == [batch.keys() for batch in given]
    assert all(torch.equal(one[name], other[name]) for one, other in zip(found, given, strict=True) for name in one)


def test_rows_as_long_as_the_model_takes() -> None:
    """Unless somebody says how long: 256 tokens, or all positions of a model that has fewer."""
    short, long = families.llama(), families.llama(max_position_embeddings=512)
    assert [row_length(model, None) for model in (short, long)] == [64, 256]
    assert row_length(long, 300) == 300
    with pytest.raises(UsageError, match="64 tokens, not 65"):
        row_length(short, 65)


def test_text_for_each_kind_of_model(text: Path) -> None:
    spec = f"text:{text}"
    tokenizer = train_byte_bpe(text_source(spec), 280, 64)
    decoder, encoder = families.llama(vocab_size=280), families.bert("BertModel", vocab_size=280)
    (rows,) = calibration_batches(decoder, spec, lambda: tokenizer, **SIZES)
    assert torch.equal(rows["input_ids"], calibration_rows(text_source(spec), tokenizer, **SIZES))
    documents = calibration_batches(encoder, [spec, spec], lambda: tokenizer, **SIZES)
    wanted = encoder_batches(text_source([spec, spec]), tokenizer, **SIZES)
    assert [batch["input_ids"].tolist() for batch in documents] == [batch["input_ids"].tolist() for batch in wanted]
    assert documents[0].keys() == {"input_ids", "attention_mask"}


IDS = families.token_ids(10, 3)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (IDS.float(), DataError, r"\[3, 10\] of torch\.float32"),
        (IDS.int(), DataError, r"torch\.int32"),
        (IDS[0], DataError, r"\[10\] of"),
        (IDS[:0], DataError, r"\[0, 10\]"),
        (IDS[:, :0], DataError, r"\[3, 0\]"),
        (IDS + 90, DataError, "token ids from 9. to 1.*the model knows 0 to 95"),
        (IDS - 96, DataError, "token ids from -"),
        (families.token_ids(65, 1), UsageError, "takes 64 tokens, not 65"),
        ([], DataError, "No data|no list"),
        ([{}], DataError, "no list of"),
        ([IDS], DataError, "no list of"),
        ([{"input_ids": IDS}, "text:x"], DataError, "no list of"),
        ("nothing:x", DataError, "no known kind"),
    ],
)
def test_refusals(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        calibration_batches(families.llama(), data, no_tokenizer, **SIZES)


def test_a_context_that_the_model_does_not_take(text: Path) -> None:
    """Said before the text is read and cut."""
    with pytest.raises(UsageError, match="takes 64 tokens, not 65") as caught:
        calibration_batches(families.llama(), f"text:{text}", no_tokenizer, rows=1, context=65, seed=0)
    assert "64" in caught.value.remedy


def test_text_in_the_tokens_of_another_model(text: Path) -> None:
    tokenizer = train_byte_bpe(text_source(f"text:{text}"), 300, 64)
    with pytest.raises(DataError, match="the model knows 0 to 95") as caught:
        calibration_batches(families.llama(), f"text:{text}", lambda: tokenizer, **SIZES)
    assert "own tokenizer" in caught.value.remedy
