"""The half-integer pyramid: no weight is zero, so signs are raw bits and shapes decode by a small table."""

from compress.codecs.half_pyramid.codec import HalfPyramidCodec, HalfPyramidConfig

__all__ = ["HalfPyramidCodec", "HalfPyramidConfig"]
