"""What torch is told about the operations: schemas, fake kernels, devices."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from compress import ops

CALLS: dict[str, tuple[Any, ...]] = {
    "pyramid_encode": (torch.randn(5, 16), torch.ones(5), torch.tensor([0.3, 0.5]), 20, 7),
    "pyramid_rank": (torch.tensor([[1, -2, 0], [0, 0, 3]], dtype=torch.int8), 3, 3),
    "pyramid_unrank": (torch.arange(9), 3, 3, 3),
    "pack_bits": (torch.arange(11), 13),
    "unpack_bits": (torch.zeros(20, dtype=torch.uint8), 13, 11),
}
WIDE: dict[str, tuple[Any, ...]] = {
    "pyramid_rank": (torch.ones(3, 80, dtype=torch.int8), 80),
    "pyramid_unrank": (torch.arange(20).view(5, 4), 80, 80),
    "pack_bits": (torch.arange(12).view(4, 3), 130),
    "unpack_bits": (torch.zeros(40, dtype=torch.uint8), 130, 2),
}
"""The same with numbers of several words."""
ALL = [
    pytest.param(name, calls[name], id=f"{name}-{kind}")
    for kind, calls in (("one", CALLS), ("many", WIDE))
    for name in calls
]


@pytest.mark.parametrize(("name", "call"), ALL)
def test_opcheck(name: str, call: tuple[Any, ...]) -> None:
    results = torch.library.opcheck(getattr(torch.ops.compress, name).default, call)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(("name", "call"), ALL)
def test_meta_tensors_give_shapes(name: str, call: tuple[Any, ...]) -> None:
    meta = [value.to("meta") if isinstance(value, torch.Tensor) else value for value in call]
    real, fake = (getattr(ops, name)(*arguments) for arguments in (call, meta))
    for one, other in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (real, fake)), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype


def test_backend_is_named() -> None:
    assert ops.backend() in ("native", "reference")


def test_first_use_imports_no_compiler() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); from compress import ops;"
        "ops.pack_bits(torch.arange(9), 7); assert 'torch._dynamo' not in set(sys.modules) - before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
