"""Integers with a scale for each group of columns: what most tools call 4-bit or 3-bit weights."""

from compress.codecs.integer.codec import IntegerCodec
from compress.codecs.integer.config import IntegerConfig

__all__ = ["IntegerCodec", "IntegerConfig"]
