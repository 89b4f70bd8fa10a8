"""Pyramid vector quantization in its published form, and with better gains and directions."""

from compress.codecs.pvq.codec import PvqCodec
from compress.codecs.pvq.config import PvqConfig

__all__ = ["PvqCodec", "PvqConfig"]
