"""What makes a model's inputs of data: the tokenizer of a model of text, the image processor of an image model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.data.pixels import ImageProcessor, check_processors, load_image_processor
from compress.modeling.loading import Kind, check_tokenizers, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Reader = PreTrainedTokenizerBase | ImageProcessor


def load_reader(kind: Kind, ref: str | Path, trust_remote_code: bool = False) -> Reader:
    """The tokenizer or image processor of the model `ref` of `kind`. Raises `ModelError` when its folder has none."""
    if kind == "image":
        return load_image_processor(ref, trust_remote_code)
    return load_tokenizer(ref, trust_remote_code)


def check_readers(kind: Kind, first_name: str, first: Any, second_name: str, second: Any) -> None:
    """Raise `ModelError` unless two models of `kind` that are to be compared read the same data alike."""
    check = check_processors if kind == "image" else check_tokenizers
    check(first_name, first, second_name, second)
