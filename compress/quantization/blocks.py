"""Matrices and their reports by block."""

from __future__ import annotations

from collections.abc import Sequence

from compress.modeling.structure import MatrixView
from compress.quantization.matrix import MatrixReport


def by_block(views: Sequence[MatrixView]) -> list[list[MatrixView]]:
    """The views of each block, blocks in order."""
    blocks: dict[int, list[MatrixView]] = {}
    for view in views:
        blocks.setdefault(view.block, []).append(view)
    return [blocks[index] for index in sorted(blocks)]


def mean_error(reports: Sequence[MatrixReport]) -> float:
    """Mean relative error over the weights of `reports`: what a progress line shows of a block."""
    weights = [report.shape[0] * report.shape[1] for report in reports]
    total = sum(weight * report.relative_error for weight, report in zip(weights, reports, strict=True))
    return total / sum(weights)
