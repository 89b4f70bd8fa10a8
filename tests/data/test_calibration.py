"""Rows of calibration data against the documents they are cut from, token by token."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from compress.data import TextSource, text_source
from compress.data.calibration import BATCH_TOKENS, calibration_rows, causal_batches, encoder_batches
from compress.data.tokenizer import train_byte_bpe
from compress.errors import DataError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> TextSource:
    """Forty documents of 1 to 79 numbers; none is like another."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "rows.json"
    texts = [" ".join(str(draw.randrange(10**4)) for _ in range(2 * number + 1)) for number in range(40)]
    path.write_text(json.dumps([{"text": text} for text in texts]))
    return text_source(f"json:{path}#text")


@pytest.fixture(scope="module")
def tokenizer(source: TextSource) -> PreTrainedTokenizerFast:
    """Padding has an id of its own here, so that a token is not taken for filling."""
    made = train_byte_bpe(source, 280, 64)
    made.add_special_tokens({"pad_token": "<pad>"})
    return made


def documents(source: TextSource, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [tokenizer(document.text)["input_ids"] for document in source.documents()]


@pytest.mark.parametrize(("rows", "context"), [(4, 16), (9, 7), (1, 64)])
def test_rows_are_windows_of_the_text(
    source: TextSource, tokenizer: PreTrainedTokenizerFast, rows: int, context: int
) -> None:
    """Cut at the separators, every part of a row is a run of tokens of one document; a part between two separators is
    a whole document. No window is drawn twice."""
    found = calibration_rows(source, tokenizer, rows=rows, context=context, seed=1)
    assert found.shape == (rows, context) and found.dtype == torch.int64
    assert len({tuple(row.tolist()) for row in found}) == rows
    stop = f" {tokenizer.eos_token_id} "
    texts = [" " + " ".join(map(str, ids)) + " " for ids in documents(source, tokenizer)]
    for row in found.tolist():
        parts = (" " + " ".join(map(str, row)) + " ").split(stop)
        assert all(any(f" {part.strip()} " in text for text in texts) for part in parts if part.strip())
        assert all(f" {part.strip()} " in texts for part in parts[1:-1])


def test_seeds(source: TextSource, tokenizer: PreTrainedTokenizerFast) -> None:
    def draw(seed: int) -> torch.Tensor:
        return calibration_rows(source, tokenizer, rows=8, context=16, seed=seed)

    assert torch.equal(draw(3), draw(3))
    drawn = [{tuple(row.tolist()) for row in draw(seed)} for seed in range(4)]
    assert all(len(one & other) <= 2 for one in drawn for other in drawn if one is not other)


def test_windows_come_from_all_that_is_read(source: TextSource, tokenizer: PreTrainedTokenizerFast) -> None:
    """Over many seeds the whole of the longest document, and one that is a single number, is drawn at some time."""
    texts = documents(source, tokenizer)
    drawn = {
        run
        for seed in range(60)
        for row in calibration_rows(source, tokenizer, rows=6, context=16, seed=seed).tolist()
        for run in zip(*(row[shift:] for shift in range(2)), strict=False)
    }
    for text in (texts[0], texts[-1]):
        runs = set(zip(*(text[shift:] for shift in range(2)), strict=False))
        assert len(runs & drawn) > 0.9 * len(runs)


def test_too_little_text(source: TextSource, tokenizer: PreTrainedTokenizerFast) -> None:
    total = sum(map(len, documents(source, tokenizer))) + 39
    with pytest.raises(DataError, match=rf"fills {total // 100} rows of 100 tokens, not 1000") as caught:
        calibration_rows(source, tokenizer, rows=1000, context=100)
    assert "fewer --rows" in caught.value.remedy
    assert len(calibration_rows(source, tokenizer, rows=total // 100, context=100)) == total // 100


def test_causal_batches_are_the_rows(source: TextSource, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = torch.arange(BATCH_TOKENS * 3).view(-1, 16)[: BATCH_TOKENS // 8 + 5]
    batches = causal_batches(rows)
    assert [len(batch["input_ids"]) for batch in batches] == [BATCH_TOKENS // 16] * 2 + [5]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), rows)
    assert all(batch.keys() == {"input_ids"} for batch in batches)
    assert len(causal_batches(torch.zeros(2, 2 * BATCH_TOKENS, dtype=torch.int64))) == 2


@pytest.mark.parametrize(("rows", "context"), [(6, 32), (100, 32), (100, 4096), (1, 8)])
def test_encoder_batches_are_documents(
    source: TextSource, tokenizer: PreTrainedTokenizerFast, rows: int, context: int
) -> None:
    batches = encoder_batches(source, tokenizer, rows=rows, context=context, seed=2)
    cut = sorted(ids[:context] for ids in documents(source, tokenizer))
    found = []
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert ids.shape == mask.shape and ids.numel() <= max(BATCH_TOKENS, context)
        lengths = mask.sum(1)
        assert torch.equal(mask, (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long())
        assert bool((ids[mask == 0] == tokenizer.pad_token_id).all())
        assert ids.shape[1] == lengths.max()
        found += [row[:length].tolist() for row, length in zip(ids, lengths.tolist(), strict=True)]
    assert [len(ids) for ids in found] == sorted(len(ids) for ids in found)
    assert all(ids in cut for ids in found)
    tokens, whole = sum(map(len, found)), sum(map(len, cut))
    assert tokens <= rows * context
    assert tokens + context > rows * context or tokens == whole
    if tokens == whole:
        assert sorted(found) == cut


def test_encoder_seeds(source: TextSource, tokenizer: PreTrainedTokenizerFast) -> None:
    def draw(seed: int) -> list[list[int]]:
        return [
            row
            for batch in encoder_batches(source, tokenizer, rows=4, context=32, seed=seed)
            for row in batch["input_ids"].tolist()
        ]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)


def test_no_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "empty.txt").touch()
    nothing = text_source(f"text:{tmp_path / 'empty.txt'}")
    with pytest.raises(DataError, match="holds no text"):
        encoder_batches(nothing, tokenizer)
    with pytest.raises(DataError, match="holds no text"):
        calibration_rows(nothing, tokenizer)
