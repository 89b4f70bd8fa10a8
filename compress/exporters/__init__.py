"""Models in files that other runtimes run, checked by running them there."""

from compress.exporters.base import ExportReport
from compress.exporters.bitsandbytes import build_bitsandbytes
from compress.exporters.onnx import OnnxOptions, build_onnx, export_onnx
from compress.exporters.registry import BUILDERS, DTYPES, export, export_names

__all__ = [
    "BUILDERS",
    "DTYPES",
    "ExportReport",
    "OnnxOptions",
    "build_bitsandbytes",
    "build_onnx",
    "export",
    "export_names",
    "export_onnx",
]
