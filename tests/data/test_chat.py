"""Chats through a tokenizer's template, against the template applied by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from compress.data import fingerprint, text_source, tokenize
from compress.data.calibration import calibration_rows, encoder_batches
from compress.data.tokenizer import END_OF_TEXT, train_byte_bpe
from compress.errors import DataError

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}<|endoftext|>"
)
CHATS = [
    [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"answer é {number}"}]
    for number in range(12)
]
RENDERED = [f"<user>question {number}<assistant>answer é {number}{END_OF_TEXT}" for number in range(12)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text("question answer user assistant é 0 1 2 3 4 5 6 7 8 9 " * 20)
    made = train_byte_bpe(text_source(f"text:{path}"), 264, 256)
    made.chat_template = TEMPLATE
    return made


def write(path: Path, records: list[object]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """The same chats in every form that they may have."""
    messages = [{"messages": chat, "id": 1} for chat in CHATS]
    turns = [{"prompt": chat[0]["content"], "response": chat[1]["content"]} for chat in CHATS]
    named = [{"question": one["prompt"], "reply": one["response"]} for one in turns]
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps(messages))
    return {
        "lines": f"chat:{write(tmp_path / 'lines.jsonl', messages)}",
        "list": f"chat:{listed}",
        "field": f"chat:{write(tmp_path / 'field.jsonl', [{'talk': chat} for chat in CHATS])}#talk",
        "turns": f"chat:{write(tmp_path / 'turns.jsonl', turns)}",
        "named": f"chat:{write(tmp_path / 'named.jsonl', named)}#question,reply",
    }


@pytest.mark.parametrize("form", ["lines", "list", "field", "turns", "named"])
def test_a_chat_is_what_the_template_makes_of_it(
    form: str, files: dict[str, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    """The template's own end of text is the separator: no second one follows."""
    stream = tokenize(text_source(files[form]), tokenizer)
    assert stream.ids.tolist() == tokenizer("".join(RENDERED), add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(stream.ids) == "".join(RENDERED)
    assert int(stream.bytes.sum()) == len("".join(RENDERED).encode())


def test_a_template_without_an_end_gets_the_separator(
    files: dict[str, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    short = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token=END_OF_TEXT,
        chat_template=TEMPLATE.replace("<|endoftext|>", ""),
    )
    stream = tokenize(text_source(files["lines"]), short)
    assert short.decode(stream.ids) == "".join(RENDERED).removesuffix(END_OF_TEXT)


def test_calibration_sees_the_same_text(files: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> None:
    rows = calibration_rows(text_source(files["lines"]), tokenizer, rows=3, context=16, seed=1)
    for row in rows:
        parts = tokenizer.decode(row).split(END_OF_TEXT)
        assert all(any(part in chat for chat in RENDERED) for part in parts)
    (batch,) = encoder_batches(text_source(files["lines"]), tokenizer, rows=12, context=256)
    found = {
        tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    }
    assert found == set(RENDERED)


def test_the_fingerprint_knows_roles(files: dict[str, str], tmp_path: Path) -> None:
    swapped = [[{**chat[0], "role": "system"}, chat[1]] for chat in CHATS]
    other = f"chat:{write(tmp_path / 'other.jsonl', [{'messages': chat} for chat in swapped])}"
    prints = {fingerprint(text_source(spec)).sha256 for spec in (files["lines"], other)}
    assert len(prints) == 2


def test_chats_of_a_data_set(files: dict[str, str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"messages": CHATS, "score": [1.0] * len(CHATS)})
    datasets.DatasetDict(train=made).save_to_disk(str(tmp_path / "set"))
    made.to_parquet(str(tmp_path / "files" / "train-00000-of-00001.parquet"))
    wanted = tokenize(text_source(files["lines"]), tokenizer).ids
    for spec in (f"chat:{tmp_path / 'set'}@train", f"chat:{tmp_path / 'set'}#messages", f"chat:{tmp_path / 'files'}"):
        assert torch.equal(tokenize(text_source(spec), tokenizer).ids, wanted)


def test_a_tokenizer_without_a_template(files: dict[str, str], tmp_path: Path) -> None:
    source = text_source(files["lines"])
    with pytest.raises(DataError, match="no chat template") as caught:
        tokenize(source, train_byte_bpe(source, 270, 64))
    assert "chat model" in caught.value.remedy


def test_a_template_that_refuses(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    chats = [*CHATS[:2], [{"role": "tool", "content": "x"}]]
    path = write(tmp_path / "tools.jsonl", [{"messages": chat} for chat in chats])
    with pytest.raises(DataError, match=r"refuses the chat tools\.jsonl#2: no tools here") as caught:
        tokenize(text_source(f"chat:{path}"), tokenizer)
    assert "roles" in caught.value.remedy


@pytest.mark.parametrize(
    ("records", "fields", "message"),
    [
        ([{"text": "x"}], "", "no messages, nor prompt and response"),
        ([{"messages": "x"}], "", "record 0 of .* is no list of messages"),
        ([{"messages": CHATS[0]}, {"messages": [{"role": "user"}]}], "", "record 1 of"),
        ([{"messages": [{"role": "user", "content": ["x"]}]}], "", "content of text"),
        ([{"messages": CHATS[0]}], "#mesages", "no 'mesages'"),
        ([{"a": "1", "b": "2", "c": "3"}], "#a,b,c", "more than a prompt and a response"),
        ([{"prompt": [1], "response": "x"}], "", "'prompt' of record 0 of .* is of type list"),
        ([{"messages": []}], "", "holds no text"),
        ([3], "", "Record 0 of .* is a int"),
    ],
)
def test_what_is_wrong_is_said(records: list[object], fields: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", records)
    with pytest.raises(DataError, match=message) as caught:
        fingerprint(text_source(f"chat:{path}{fields}"))
    assert caught.value.remedy


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no file"):
        text_source(f"chat:{tmp_path / 'chats.jsonl'}")
