"""Sources of text and images, tokenization, pre-processing and deterministic sampling."""

from compress.data.base import Document, Fingerprint, ImageSource, IndexedText, TextSource, fingerprint
from compress.data.sources import data_source, image_source, is_images, require_kind, text_source
from compress.data.tokens import SampledRows, TokenStream, tokenize

__all__ = [
    "Document",
    "Fingerprint",
    "ImageSource",
    "IndexedText",
    "SampledRows",
    "TextSource",
    "TokenStream",
    "data_source",
    "fingerprint",
    "image_source",
    "is_images",
    "require_kind",
    "text_source",
    "tokenize",
]
