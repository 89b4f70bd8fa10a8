"""Matrices, their payloads and their reports by block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.modeling.structure import MatrixView
from compress.quantization.matrix import MatrixReport


def by_block(views: Sequence[MatrixView]) -> list[list[MatrixView]]:
    """The views of each block, blocks in order."""
    blocks: dict[int, list[MatrixView]] = {}
    for view in views:
        blocks.setdefault(view.block, []).append(view)
    return [blocks[index] for index in sorted(blocks)]


def stacked(payloads: Sequence[tuple[MatrixView, Tensor]]) -> dict[str, Tensor]:
    """What is stored under each parameter: a payload int8 [n], of experts those of all, int8 [E, n]."""
    rows: dict[str, dict[int | None, Tensor]] = {}
    for view, payload in payloads:
        rows.setdefault(view.parameter, {})[view.index] = payload
    return {
        name: parts[None] if None in parts else torch.stack([parts[index] for index in range(len(parts))])
        for name, parts in rows.items()
    }


def mean_error(reports: Sequence[MatrixReport]) -> float:
    """Mean relative error over the weights of `reports`: what a progress line shows of a block."""
    weights = [report.shape[0] * report.shape[1] for report in reports]
    total = sum(weight * report.relative_error for weight, report in zip(weights, reports, strict=True))
    return total / sum(weights)
