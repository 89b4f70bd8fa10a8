"""Models in files that other runtimes run, checked by running them there."""

from compress.exporters.base import ExportReport
from compress.exporters.onnx import OnnxOptions, build_onnx, export_onnx
from compress.exporters.registry import export, export_names

__all__ = ["ExportReport", "OnnxOptions", "build_onnx", "export", "export_names", "export_onnx"]
