"""The integer pyramid: a group of D weights is a gain times an integer vector with a fixed sum of magnitudes."""

from compress.codecs.pyramid.codec import PyramidCodec, PyramidConfig
from compress.codecs.pyramid.table import Shape

__all__ = ["PyramidCodec", "PyramidConfig", "Shape"]
