"""How a matrix becomes bits. `codec("pyramid").quantize(weight, spec)` gives a `QuantizedMatrix`."""

from compress.codecs.base import Codec, CodecSpec, FieldLayout, QuantizedMatrix
from compress.codecs.half_pyramid import HalfPyramidCodec, HalfPyramidConfig
from compress.codecs.integer import IntegerCodec, IntegerConfig
from compress.codecs.normal_float import Fp4Codec, Fp4Config, Int8Codec, Int8Config, Nf4Codec, Nf4Config
from compress.codecs.pvq import PvqCodec, PvqConfig
from compress.codecs.pyramid import PyramidCodec, PyramidConfig
from compress.codecs.registry import codec, codec_names, codec_of, register_codec

__all__ = [
    "Codec",
    "CodecSpec",
    "FieldLayout",
    "Fp4Codec",
    "Fp4Config",
    "HalfPyramidCodec",
    "HalfPyramidConfig",
    "Int8Codec",
    "Int8Config",
    "IntegerCodec",
    "IntegerConfig",
    "Nf4Codec",
    "Nf4Config",
    "PvqCodec",
    "PvqConfig",
    "PyramidCodec",
    "PyramidConfig",
    "QuantizedMatrix",
    "codec",
    "codec_names",
    "codec_of",
    "register_codec",
]
