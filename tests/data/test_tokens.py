"""Tokens, their bytes and the order of rows against the text and brute force."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from compress.data import SampledRows, text_source, tokenize
from compress.data.tokenizer import END_OF_TEXT, train_byte_bpe
from compress.errors import DataError

TEXT = "def f(x):\n    return x + 1  # naïve — 日本語 🙂\n" * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text(TEXT, encoding="utf-8")
    return train_byte_bpe(text_source(f"text:{path}"), 290, 64)


def test_byte_bpe_is_lossless_and_of_the_asked_size(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 290
    for text in (TEXT, "\x00\t é", "completely unseen: Ωß"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    ("vocabulary", "message"), [(4096, r"a tokenizer of \d+ tokens, not of 4096.*Give more text"), (200, "not of 200")]
)
def test_a_vocabulary_that_cannot_be_reached(tmp_path: Path, vocabulary: int, message: str) -> None:
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        train_byte_bpe(text_source(f"text:{tmp_path / 't.txt'}"), vocabulary, 64)


def test_bytes_of_tokens_add_up_to_the_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    texts = [TEXT, "🙂🙂", "plain ascii"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    stream = tokenize(text_source([f"text:{tmp_path / f'{n}.txt'}" for n in range(3)]), tokenizer)
    assert int(stream.bytes.sum()) == sum(len(text.encode()) for text in texts)
    separators = stream.ids == tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    assert int(separators.sum()) == 2
    assert not stream.bytes[separators].any()
    assert tokenizer.decode(stream.ids.tolist()) == END_OF_TEXT.join(texts)


def test_rows_cut_without_overlap(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    stream = tokenize(text_source(f"text:{tmp_path / 't.txt'}"), tokenizer)
    ids, sizes = stream.rows(32)
    assert ids.shape == sizes.shape == (len(stream.ids) // 32, 32)
    assert torch.equal(ids.flatten(), stream.ids[: ids.numel()])
    assert len(stream.rows(32, limit=70)[0]) == 2
    with pytest.raises(DataError, match="fewer than one window of 99999"):
        stream.rows(99999)


def test_sampled_rows_are_a_permutation_each_epoch_and_random_access() -> None:
    rows = torch.arange(7).unsqueeze(1)
    data = SampledRows(rows, 30, seed=5)
    forward = [int(data[i]["input_ids"]) for i in range(30)]
    for epoch in range(4):
        assert sorted(forward[7 * epoch : 7 * epoch + 7]) == list(range(7))[: len(forward[7 * epoch : 7 * epoch + 7])]
    assert forward[:7] != forward[7:14]
    other = SampledRows(rows, 30, seed=5)
    assert [int(other[i]["input_ids"]) for i in reversed(range(30))] == forward[::-1]
    assert [int(SampledRows(rows, 30, seed=6)[i]["input_ids"]) for i in range(30)] != forward
