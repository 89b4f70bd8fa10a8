"""Rank and unrank of integer pyramids in torch and exact integers: the definition of every backend.

A vector's index counts the vectors before it, coordinate by coordinate, in the order 0, +1, -1, +2, -2, ... (Fischer
1986). With d coordinates and k pulses left, N(d-1, k) of the remaining vectors have a 0 first and N(d-1, k-j) each have
+j and -j. Codebooks of fewer than 2^63 vectors are ranked in int64, larger ones one by one in Python's integers.
"""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import Tensor

from compress.errors import CodecError
from compress.ops.tables import codebook_size, count_table, counts, fits_int64, index_words, offset_table
from compress.ops.words import from_words, to_words


def pyramid_rank(y: Tensor, pulses: int, limit: int) -> Tensor:
    """Index of each y int8 [G, D] in its codebook: int64 [G], or words [G, W] where one is not enough."""
    magnitude = y.to(torch.int64).abs()
    words = index_words(y.shape[1], pulses, limit)
    if y.shape[0] and bool(((magnitude.sum(-1) != pulses) | (magnitude.amax(-1) > limit)).any()):
        raise CodecError(f"A vector to rank does not have {pulses} pulses, at most {limit} on one coordinate.")
    if fits_int64(y.shape[1], pulses, limit):
        return _rank_int64(y, magnitude, pulses, limit)
    table = counts(y.shape[1], pulses, limit)
    return to_words([_rank_one(word, table, pulses) for word in y.tolist()], words).to(y.device)


def pyramid_unrank(index: Tensor, dim: int, pulses: int, limit: int) -> Tensor:
    """The vector y int8 [G, dim] of each index; the inverse of `pyramid_rank`."""
    size = codebook_size(dim, pulses, limit)
    if fits_int64(dim, pulses, limit):
        if index.numel() and bool(((index < 0) | (index >= size)).any()):
            raise outside(size)
        return _unrank_int64(index, dim, pulses, limit)
    numbers = from_words(index)
    if numbers and max(numbers) >= size:
        raise outside(size)
    table = counts(dim, pulses, limit)
    vectors = [_unrank_one(number, table, pulses, limit) for number in numbers]
    return torch.tensor(vectors, dtype=torch.int8, device=index.device).view(len(numbers), dim)


def outside(size: int) -> CodecError:
    """The error for an index that no vector has."""
    return CodecError(f"An index lies outside its codebook of {size} vectors.", remedy="The codes are damaged.")


def _rank_int64(y: Tensor, magnitude: Tensor, pulses: int, limit: int) -> Tensor:
    groups, dim = y.shape
    words = count_table(dim, pulses, limit).to(y.device)
    offsets = offset_table(dim, pulses, limit).to(y.device)
    index = torch.zeros(groups, dtype=torch.int64, device=y.device)
    left = torch.full_like(index, pulses)
    for i in range(dim):
        d, m = dim - i, magnitude[:, i]
        index += offsets[d][left, m]
        left -= m
        index += torch.where(y[:, i] < 0, words[d - 1][left], 0)
    return index


def _unrank_int64(index: Tensor, dim: int, pulses: int, limit: int) -> Tensor:
    words = count_table(dim, pulses, limit).to(index.device)
    offsets = offset_table(dim, pulses, limit).to(index.device)
    y = torch.empty((index.numel(), dim), dtype=torch.int8, device=index.device)
    rest = index.clone()
    left = torch.full_like(index, pulses)
    for i in range(dim):
        d = dim - i
        m = torch.searchsorted(offsets[d][left], rest.unsqueeze(-1), right=True).squeeze(-1) - 1
        rest -= offsets[d][left, m]
        left -= m
        positive = words[d - 1][left]
        negative = (m > 0) & (rest >= positive)
        rest -= torch.where(negative, positive, 0)
        y[:, i] = torch.where(negative, -m, m)
    return y


def _rank_one(y: list[int], table: tuple[tuple[int, ...], ...], pulses: int) -> int:
    index, left = 0, pulses
    for d, value in zip(reversed(range(len(y))), y, strict=True):
        m, row = abs(value), table[d]
        if m > 0:
            index += row[left] + 2 * sum(row[left - m + 1 : left])
        left -= m
        if value < 0:
            index += row[left]
    return index


def _unrank_one(rest: int, table: tuple[tuple[int, ...], ...], pulses: int, limit: int) -> list[int]:
    y, left = [], pulses
    for row in reversed(table[:-1]):
        first = [0, row[left]]
        for m in range(1, min(left, limit) + 1):
            if first[-1] > rest:
                break
            first.append(first[-1] + 2 * row[left - m])
        m = bisect_right(first, rest) - 1
        rest -= first[m]
        left -= m
        negative = m > 0 and rest >= row[left]
        rest -= row[left] if negative else 0
        y.append(-m if negative else m)
    return y
