"""Pairs of sentences: as a tokenizer joins them for an encoder, with a line end for a decoder."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from compress.data import fingerprint, text_source, tokenize
from compress.data.calibration import encoder_batches
from compress.errors import DataError
from compress.evaluation.encoder import evaluate_encoder

WORDS = [f"w{number}" for number in range(40)]
PAIRS = [(" ".join(WORDS[number : 2 * number + 1]), WORDS[39 - number]) for number in range(1, 12)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One that joins as BERT's does: [CLS] a [SEP] b [SEP], with type 1 for the second."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture
def specs(tmp_path: Path) -> list[str]:
    with (tmp_path / "t.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("a", "b"), *PAIRS])
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"a": one, "b": two}) for one, two in PAIRS))
    with (tmp_path / "bare.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(PAIRS)
    return [f"csv:{tmp_path / 't.csv'}#a+b", f"json:{tmp_path / 't.jsonl'}#a+b", f"csv:{tmp_path / 'bare.csv'}#0+1"]


def test_pairs_of_every_kind_of_file(specs: list[str]) -> None:
    for spec in specs:
        assert [(one.text, one.second) for one in text_source(spec).documents()] == PAIRS
    assert len({fingerprint(text_source(spec)).bytes for spec in specs}) == 1


def test_pairs_of_a_data_set(specs: list[str], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"a": one, "b": two} for one, two in PAIRS]).save_to_disk(str(tmp_path / "set"))
    source = text_source(f"dataset:{tmp_path / 'set'}#a+b")
    assert [(one.text, one.second) for one in source.documents()] == PAIRS


def test_an_encoder_gets_pairs_as_its_tokenizer_joins_them(
    specs: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    (batch,) = encoder_batches(text_source(specs[0]), tokenizer, rows=64, context=16)
    assert batch.keys() == {"input_ids", "token_type_ids", "attention_mask"}
    found = set()
    names = ("input_ids", "token_type_ids", "attention_mask")
    for ids, types, mask in zip(*(batch[name].tolist() for name in names), strict=True):
        size = sum(mask)
        found.add((tuple(ids[:size]), tuple(types[:size])))
        assert not any(types[size:])
    wanted = set()
    for one, two in PAIRS:
        encoded = tokenizer(one, two, truncation=True, max_length=16)
        wanted.add((tuple(encoded["input_ids"]), tuple(encoded["token_type_ids"])))
    assert all(1 in types for _, types in wanted)
    assert found == wanted


def test_a_decoder_gets_pairs_as_two_lines(specs: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    stream = tokenize(text_source(specs[0]), tokenizer)
    wanted = [tokenizer(f"{one}\n{two}", add_special_tokens=False)["input_ids"] for one, two in PAIRS]
    assert stream.ids.tolist() == [token for ids in wanted for token in ids]


def test_cosine_of_pairs_is_that_of_single_pairs(
    specs: list[str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Also where a text without a second stands between them, and with what tells first and second apart."""
    (tmp_path / "one.txt").write_text("w1 w2 w3")
    source = text_source([specs[0], f"text:{tmp_path / 'one.txt'}"])
    models_ = []
    for seed in range(2):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        models_.append(BertModel(BertConfig(vocab_size=44, initializer_range=0.3, **sizes)).eval())
    found = evaluate_encoder(models_[0], models_[1], tokenizer, source, context=32, batch=4)
    cosines, tokens = [], 0
    with torch.no_grad():
        for texts in [*PAIRS, ("w1 w2 w3",)]:
            encoded = tokenizer(*texts, return_tensors="pt")
            one, other = (model(**encoded).last_hidden_state[0].mean(0).double() for model in models_)
            cosines.append(float(one @ other / (one.norm() * other.norm())))
            tokens += encoded["input_ids"].shape[1]
    assert found["documents"] == len(PAIRS) + 1 and found["tokens"] == tokens
    assert found["cosine"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)


def test_names_that_hold_the_signs(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('C++,"a,b",c\n1,2,3\n')
    read = {
        fields: [(one.text, one.second) for one in text_source(f"csv:{tmp_path / 't.csv'}#{fields}").documents()]
        for fields in ("C++", "a,b", "c+a,b")
    }
    assert read == {"C++": [("1", None)], "a,b": [("2", None)], "c+a,b": [("3", "2")]}


@pytest.mark.parametrize(
    ("fields", "message"), [("a+b+c", "names no fields"), ("a+", "names no fields"), ("a+x", "'x'")]
)
def test_what_is_wrong_is_said(fields: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b,c\n1,2,3\n")
    (tmp_path / "t.json").write_text('[{"a": "1", "b": "2", "c": "3"}]')
    for spec in (f"csv:{tmp_path / 't.csv'}#{fields}", f"json:{tmp_path / 't.json'}#{fields}"):
        with pytest.raises(DataError, match=message) as caught:
            list(text_source(spec).documents())
        assert caught.value.remedy


def test_half_a_pair_is_none(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n1,2\n3,\n,4\n5,6\n")
    found = [(one.text, one.second) for one in text_source(f"csv:{tmp_path / 't.csv'}#a+b").documents()]
    assert found == [("1", "2"), ("5", "6")]


def test_a_row_without_room(specs: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="room for text") as caught:
        encoder_batches(text_source(specs[0]), tokenizer, rows=1, context=3)
    assert "--context" in caught.value.remedy
