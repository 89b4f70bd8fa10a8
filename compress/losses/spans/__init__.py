"""The span-level loss of MGSR, and what says which tokens belong together."""

from compress.losses.spans.correlation import SpanCorrelation
from compress.losses.spans.phrases import EnglishPhrases
from compress.losses.spans.sources import ChunkSpans, FixedSpans, PunctuationSpans, SpanSource

__all__ = ["ChunkSpans", "EnglishPhrases", "FixedSpans", "PunctuationSpans", "SpanCorrelation", "SpanSource"]
