"""Text sources, tokenization and deterministic sampling."""

from compress.data.base import Document, Fingerprint, TextSource, fingerprint
from compress.data.sources import text_source
from compress.data.tokens import SampledRows, TokenStream, tokenize

__all__ = [
    "Document",
    "Fingerprint",
    "SampledRows",
    "TextSource",
    "TokenStream",
    "fingerprint",
    "text_source",
    "tokenize",
]
