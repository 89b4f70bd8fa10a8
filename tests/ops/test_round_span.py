"""Compiled rounding of spans against the definition, one call of the encoder at a time in torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.codecs import codec
from compress.codecs.base import Rounding
from compress.ops.native import INSTRUCTIONS
from compress.ops.rounding import can_round_spans

pytestmark = pytest.mark.skipif(not can_round_spans(torch.zeros(1)), reason="needs the compiled library")

CASES = [
    ("half_pyramid", {}, 26),
    ("half_pyramid", {"levels": "uniform", "coset": False}, 20),
    ("half_pyramid", {"dim": 16}, 52),
    ("half_pyramid", {"dim": 32}, 80),
    ("pyramid", {}, 52),
]


def spans(rounding: Rounding, weight: Tensor, columns: int, places: list[int], compiled: bool) -> list[Tensor]:
    """A first pass and one with `keep`, with random matrices of the right kind."""
    generator = torch.Generator().manual_seed(3)
    blocks = len(places)
    roots = torch.randn(blocks, rounding.dim, rounding.dim, generator=generator)
    metrics = roots @ roots.mT + 0.1 * torch.eye(rounding.dim)
    metrics = metrics / torch.linalg.eigvalsh(metrics)[:, -1:, None]
    inverses = torch.randn(blocks, rounding.dim, rounding.dim, generator=generator) * 0.2
    coupling = torch.randn(columns, columns, generator=generator) * 0.1
    rounding.scale(0, weight)
    found = []
    for keep in (False, True):
        base = weight[:, torch.randperm(weight.shape[1], generator=generator)[:columns]]
        carried = torch.randn(len(weight), columns, generator=generator) * 0.3
        method = rounding.round_span if compiled else super(type(rounding), rounding).round_span
        found.append(method(places, base, carried, inverses, metrics, coupling, keep))
    return [*found, rounding.decoded()]


@pytest.mark.parametrize(("name", "options", "width"), CASES)
@pytest.mark.parametrize("rows", [1, 67])
def test_the_same_codes(name: str, options: dict[str, object], width: int, rows: int) -> None:
    """But where two codes are as near as float32 tells: sums run in another order."""
    method = codec(name, **options)
    dim, columns = method.dim, 6 * method.dim - 3
    weight = torch.randn(rows, 8 * dim + 5, generator=torch.Generator().manual_seed(rows))
    weight[0] = 0.0
    # five whole blocks, and the short last one of the matrix
    places = [3 * dim, 0, 6 * dim, dim, 5 * dim, 8 * dim]
    base = 5 * dim + 5 if dim > 5 else columns
    pair = [
        spans(
            method.rounding((rows, weight.shape[1]), method.spec(width), weight.device), weight, base, places, compiled
        )
        for compiled in (True, False)
    ]
    for ours, defined in zip(*pair, strict=True):
        same = torch.isclose(ours, defined, rtol=1e-6, atol=0).all(1)
        assert float(same.double().mean()) >= (1.0 if rows == 1 else 0.97)
    assert not pair[0][2][0].any()  # a row of zeros stays one


def test_every_instruction_set_gives_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.ops import rounding as module

    library = module._library()
    assert library is not None
    method = codec("half_pyramid")
    weight = torch.randn(130, 64, generator=torch.Generator().manual_seed(1))
    found = []
    for instructions in library.instructions:
        assert instructions in INSTRUCTIONS
        chosen = library.round_span
        with monkeypatch.context() as patch:
            patch.setattr(
                library, "round_span", lambda *args, one=instructions, run=chosen: run(*args, instructions=one)
            )
            rounding = method.rounding((130, 64), method.spec(26), weight.device)
            found.append(spans(rounding, weight, 64, [8 * place for place in range(8)], compiled=True))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one, two)
