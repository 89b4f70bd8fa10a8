"""The formats of bitsandbytes: 4-bit codes into a table of 16 values, and rows of 8-bit integers."""

from compress.codecs.normal_float.codec import Fp4Codec, Nf4Codec, TableCodec
from compress.codecs.normal_float.config import Fp4Config, Int8Config, Nf4Config, TableConfig
from compress.codecs.normal_float.int8 import Int8Codec

__all__ = [
    "Fp4Codec",
    "Fp4Config",
    "Int8Codec",
    "Int8Config",
    "Nf4Codec",
    "Nf4Config",
    "TableCodec",
    "TableConfig",
]
