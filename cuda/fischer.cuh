// Index of a vector of an integer pyramid in its codebook, and back (Fischer 1986).
//
// Vectors are in lexicographic order, the values of one coordinate in the order 0, +1, -1, +2, -2, ... So a scan over
// the coordinates that adds the sizes of all blocks passed over gives the index, and one that subtracts them finds the
// vector: D + K sums or comparisons. With d coordinates and k pulses after the present one, a block has N(d, k)
// vectors.
//
// Numbers are W 64-bit words, least significant first. W is a constant of the code (1, 2, 3, ...) or 0 for a count that
// is known at run time; a table holds N(d, k) at ((d * (pulses + 1) + k) * words). The tables are those of
// compress/ops/tables.py, where a number that no vector reaches may be cut to all ones.
#pragma once

#include <cstdint>

#include "macros.cuh"

namespace compress {

// The most words of an index; 128 coordinates of at most 127 need 16.
constexpr int kMostWords = 16;

template <int W>
COMPRESS_HD void add_words(uint64_t* sum, const uint64_t* term, int words) {
  const int count = W > 0 ? W : words;
  uint64_t carry = 0;
  for (int w = 0; w < count; ++w) {
    const uint64_t part = sum[w] + carry;
    carry = part < carry;
    sum[w] = part + term[w];
    carry += sum[w] < part;
  }
}

// If rest >= term: subtracts it and returns true.
template <int W>
COMPRESS_HD bool take_words(uint64_t* rest, const uint64_t* term, int words) {
  const int count = W > 0 ? W : words;
  int top = count - 1;
  while (top > 0 && rest[top] == term[top]) --top;
  if (rest[top] < term[top]) return false;
  uint64_t borrow = 0;
  for (int w = 0; w < count; ++w) {
    const uint64_t part = rest[w] - borrow;
    borrow = part > rest[w];
    rest[w] = part - term[w];
    borrow += rest[w] > part;
  }
  return true;
}

// Writes the index of y[dim]; false when y does not have `pulses` pulses, at most `limit` on one coordinate.
template <int W>
COMPRESS_HD bool fischer_rank(const int8_t* y, const uint64_t* table, int words, int dim, int pulses, int limit,
                              uint64_t* index) {
  const int count = W > 0 ? W : words;
  for (int w = 0; w < count; ++w) index[w] = 0;
  int left = pulses;
  for (int i = 0; i < dim; ++i) {
    const int magnitude = y[i] < 0 ? -y[i] : y[i];
    if (magnitude > left || magnitude > limit) return false;
    const uint64_t* row = table + static_cast<int64_t>(dim - 1 - i) * (pulses + 1) * count;
    if (magnitude > 0) add_words<W>(index, row + left * count, words);
    for (int m = 1; m < magnitude; ++m) {
      add_words<W>(index, row + (left - m) * count, words);
      add_words<W>(index, row + (left - m) * count, words);
    }
    left -= magnitude;
    if (y[i] < 0) add_words<W>(index, row + left * count, words);
  }
  return left == 0;
}

// Writes the vector of an index; the inverse of fischer_rank. False when the index is not below N(dim, pulses).
template <int W>
COMPRESS_HD bool fischer_unrank(const uint64_t* index, const uint64_t* table, int words, int dim, int pulses, int limit,
                                int8_t* y) {
  const int count = W > 0 ? W : words;
  uint64_t rest[W > 0 ? W : kMostWords];
  for (int w = 0; w < count; ++w) rest[w] = index[w];
  int left = pulses;
  for (int i = 0; i < dim; ++i) {
    const uint64_t* row = table + static_cast<int64_t>(dim - 1 - i) * (pulses + 1) * count;
    const int most = left < limit ? left : limit;
    int magnitude = 0;
    bool negative = false;
    if (take_words<W>(rest, row + left * count, words)) {
      for (magnitude = 1; magnitude <= most; ++magnitude) {
        const uint64_t* block = row + (left - magnitude) * count;
        if (!take_words<W>(rest, block, words)) break;
        negative = !take_words<W>(rest, block, words);
        if (negative) break;
      }
      if (magnitude > most) return false;
    }
    left -= magnitude;
    y[i] = static_cast<int8_t>(negative ? -magnitude : magnitude);
  }
  return true;
}

}  // namespace compress
