"""Numbers of more than 64 bits as tensors: int64 words, least significant first, read as unsigned patterns.

One word suffices for numbers below 2^64: those are int64 [G]. Larger ones are [G, W] with W = ceil(bits / 64).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WORD = 64
MOST_WORDS = 16
"""Words of the largest numbers here: 128 coordinates of at most 127 have fewer than 2^1024 vectors."""


def word_count(bits: int) -> int:
    """W = ceil(bits / 64), at least 1."""
    return max(1, -(-bits // WORD))


def words_shape(count: int, words: int) -> tuple[int, ...]:
    """The shape of `count` numbers of `words` words: [G], or [G, W] for more than one."""
    return (count,) if words == 1 else (count, words)


def to_words(values: Sequence[int], words: int) -> Tensor:
    """Integers from 0 to 2^(64 W) - 1 as int64 [G] or [G, W]."""
    data = b"".join(value.to_bytes(8 * words, "little") for value in values)
    flat = torch.frombuffer(bytearray(data), dtype=torch.int64) if data else torch.empty(0, dtype=torch.int64)
    return flat.view(words_shape(len(values), words))


def from_words(numbers: Tensor) -> list[int]:
    """The integers of int64 [G] or [G, W]; the inverse of `to_words`."""
    size = 8 * (1 if numbers.ndim == 1 else numbers.shape[1])
    data = numbers.cpu().contiguous().numpy().tobytes()
    return [int.from_bytes(data[start : start + size], "little") for start in range(0, len(data), size)]
