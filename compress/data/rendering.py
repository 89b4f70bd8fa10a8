"""From a document to what a tokenizer takes: the one place where chats and pairs of sentences become tokens.

| document | for a model that predicts tokens | for an encoder |
|---|---|---|
| text | as it is, without special tokens | with the tokenizer's special tokens |
| pair | both texts with a line end between | as the tokenizer joins pairs, with `token_type_ids` where it has them |
| chat | the tokenizer's chat template, which writes its own special tokens | likewise |

Calibration, training and evaluation all come through here, so that they see the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compress.data.base import Document
from compress.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render(document: Document, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of `document` as a model that predicts tokens reads it. Raises `DataError` for a chat when the tokenizer
    has no chat template, or one that refuses it."""
    if document.messages:
        return _chat(document, tokenizer)
    return document.text if document.second is None else f"{document.text}\n{document.second}"


def is_like(one: Document, other: Document) -> bool:
    """Whether `encode` takes the two together: both texts, both pairs, or both chats."""
    return (one.second is None, not one.messages) == (other.second is None, not other.messages)


def encode(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, context: int, **options: Any
) -> dict[str, Any]:
    """The inputs of an encoder for `documents`, which are like the first of them, each cut to `context` tokens, of a
    pair the longer text first. `token_type_ids` are those of a pair; elsewhere they say nothing. `options` are the
    tokenizer's. Raises `DataError` when not even the special tokens fit."""
    first = documents[0]
    chat = bool(first.messages)
    texts = [_chat(one, tokenizer) if chat else one.text for one in documents]
    seconds = [str(one.second) for one in documents] if first.second is not None else None
    least = tokenizer.num_special_tokens_to_add(pair=seconds is not None)
    if context <= least and not chat:
        raise DataError(
            f"A row of {context} tokens has no room for text: '{tokenizer.name_or_path}' adds {least} of its own.",
            remedy="Use a larger --context.",
        )
    encoded = dict(
        tokenizer(texts, seconds, truncation=True, max_length=context, add_special_tokens=not chat, **options)
    )
    if seconds is None:
        encoded.pop("token_type_ids", None)
    return encoded


def _chat(document: Document, tokenizer: PreTrainedTokenizerBase) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise DataError(
            f"The tokenizer '{tokenizer.name_or_path}' has no chat template, which the chat {document.name} needs.",
            remedy="Use the tokenizer of a chat model, or name the text itself as json:FILE#FIELD.",
        )
    messages = [dict(message) for message in document.messages]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, ValueError, TypeError) as error:
        raise DataError(
            f"The chat template of '{tokenizer.name_or_path}' refuses the chat {document.name}: {error}.",
            remedy="Correct the roles of its messages, or leave it out.",
        ) from error
