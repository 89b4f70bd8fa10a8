"""Signs are a function of seed and name, and stored as bits."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from compress.errors import CodecError
from compress.transforms.signs import MIXINGS, matrix_signs, mixed_sides, pack_signs, random_signs, unpack_signs


def test_pinned() -> None:
    """What artifacts of other days were made with."""
    assert random_signs(16, 0, "residual").tolist() == [1, 1, -1, 1, -1, -1, 1, 1, -1, 1, -1, 1, -1, -1, -1, 1]
    assert pack_signs(random_signs(20, 7, "model.layers.0.mlp.down_proj.input")).tolist() == [2, 208, 12]


@pytest.mark.parametrize("n", [0, 1, 7, 8, 255, 256, 257, 1000])
def test_by_the_documented_rule(n: int) -> None:
    digests = [hashlib.sha256(f"5/a.b/{block}".encode()).digest() for block in range(n // 256 + 1)]
    bits = np.unpackbits(np.frombuffer(b"".join(digests), np.uint8), bitorder="little")[:n]
    signs = random_signs(n, 5, "a.b")
    assert signs.dtype == torch.int8 and signs.tolist() == [-1 if bit else 1 for bit in bits]
    packed = pack_signs(signs)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == np.packbits(bits, bitorder="little").tolist()
    assert unpack_signs(packed, n).equal(signs)


def test_seeds_and_names_differ() -> None:
    drawn = {tuple(random_signs(64, seed, name).tolist()) for seed in (0, 1) for name in ("a", "b")}
    assert len(drawn) == 4


def test_sides() -> None:
    assert [mixed_sides(word) for word in MIXINGS] == [(False, False), (True, False), (False, True), (True, True)]
    for word in MIXINGS:
        signs = matrix_signs(word, (6, 10), 0, "m", "g")
        assert signs.mixing == word
        assert (signs.input is None or signs.input.shape == (10,)) and (
            signs.output is None or signs.output.shape == (6,)
        )
    with pytest.raises(CodecError, match="no mixing 'all'"):
        mixed_sides("all")
