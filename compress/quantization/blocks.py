"""One block of the model: each of its matrices rounded in turn.

Without calibration data the matrices do not depend on each other, and the order is that of the modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from compress.codecs.base import Codec, QuantizedMatrix
from compress.modeling.structure import MatrixView
from compress.quantization.matrix import MatrixReport, quantize_matrix


def by_block(views: Sequence[MatrixView]) -> list[list[MatrixView]]:
    """The views of each block, blocks in order."""
    blocks: dict[int, list[MatrixView]] = {}
    for view in views:
        blocks.setdefault(view.block, []).append(view)
    return [blocks[index] for index in sorted(blocks)]


def quantize_block(
    views: Sequence[MatrixView], read: Callable[[MatrixView], Tensor], codec: Codec, widths: Mapping[str, int]
) -> Iterator[tuple[MatrixView, QuantizedMatrix, MatrixReport]]:
    """Round the matrices of one block, one at a time. `read` gives a view's weight [out, in]; `widths` the bits of a
    group's code by the matrix's name. Raises as `quantize_matrix` does."""
    for view in views:
        matrix, report = quantize_matrix(view.name, read(view), codec, codec.spec(widths[view.name]))
        yield view, matrix, report


def mean_error(reports: Sequence[MatrixReport]) -> float:
    """Mean relative error over the weights of `reports`: what a progress line shows of a block."""
    weights = [report.shape[0] * report.shape[1] for report in reports]
    total = sum(weight * report.relative_error for weight, report in zip(weights, reports, strict=True))
    return total / sum(weights)
