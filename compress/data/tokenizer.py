"""Training a byte-level BPE tokenizer, as the built-in models use it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.data.base import TextSource
from compress.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def train_byte_bpe(source: TextSource, vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of exactly `vocabulary` tokens (256 bytes, the merges, one end-of-text token).

    Words are split as in GPT-2, so that a run of indentation is one piece; no text is ever out of vocabulary. The same
    text gives the same tokenizer (ties between merges are broken by token id). Raises `DataError` for a text that has
    too few pairs of tokens to merge, and for a vocabulary that the bytes alone exceed.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in source.documents()), trainer)
    if (found := tokenizer.get_vocab_size()) != vocabulary:
        raise DataError(
            f"The text of '{source.spec}' makes a tokenizer of {found} tokens, not of {vocabulary}.",
            remedy=f"Give more text, or set vocab_size to {found}."
            if found < vocabulary
            else "Use a larger vocab_size.",
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
