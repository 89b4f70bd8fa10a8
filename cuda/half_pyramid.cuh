// The half-integer pyramid, one group at a time, for the CPU and the GPU: its planes of bits, and ranks by halves.
//
// A group is D = 8, 16 or 32 weights; its rest is ((rank L + gain) 2 + coset), the last bit only where there is a
// coset, and rank is that of the composition m of K into D parts of at most M (compress/ops/half_pyramid/shape.py):
//
//   rank(m) = T_D(k, k') + rank(left) N_{D/2}(k - k') + rank(right)
//
// Halves are taken down to four parts, which a table of all compositions holds. Eight parts travel as one word, an
// octet: byte b is m_b | m_{b+4} << 4, so that a mask and a shift give the indices of two byte shuffles. Where M > 15
// (a `kDeep` pyramid) a byte of tops stands beside it, bit i the fifth bit of m_i; and a part of a group may have more
// ranks than four bits a weight can count, so that its integers are twice as wide.
// Under NVRTC the includer provides the fixed-width integers.
#pragma once

#if !defined(__CUDACC_RTC__)
#include <cstdint>
#endif

#include "macros.cuh"

namespace compress {

// 128 bits of two words, for the ranks of 32 coordinates.
struct Wide {
  uint64_t low, high;
};

COMPRESS_HD bool at_least(uint32_t a, uint32_t b) { return a >= b; }
COMPRESS_HD bool at_least(uint64_t a, uint64_t b) { return a >= b; }
COMPRESS_HD bool at_least(Wide a, Wide b) { return a.high > b.high || (a.high == b.high && a.low >= b.low); }

COMPRESS_HD uint32_t plus(uint32_t a, uint32_t b) { return a + b; }
COMPRESS_HD uint64_t plus(uint64_t a, uint64_t b) { return a + b; }
COMPRESS_HD Wide plus(Wide a, Wide b) {
  const uint64_t low = a.low + b.low;
  return {low, a.high + b.high + (low < a.low ? 1u : 0u)};
}

COMPRESS_HD uint32_t minus(uint32_t a, uint32_t b) { return a - b; }
COMPRESS_HD uint64_t minus(uint64_t a, uint64_t b) { return a - b; }
COMPRESS_HD Wide minus(Wide a, Wide b) { return {a.low - b.low, a.high - b.high - (a.low < b.low ? 1u : 0u)}; }

COMPRESS_HD Wide product(uint64_t a, uint64_t b) {
  const uint64_t half = 0xffffffffu;
  const uint64_t low = (a & half) * (b & half), cross = (a >> 32) * (b & half), other = (a & half) * (b >> 32);
  const uint64_t middle = (low >> 32) + (cross & half) + (other & half);
  return {(low & half) | middle << 32, (a >> 32) * (b >> 32) + (cross >> 32) + (other >> 32) + (middle >> 32)};
}

// value / divisor and value % divisor, for a small divisor.
COMPRESS_HD uint32_t take_digit(uint32_t& value, uint32_t divisor) {
  const uint32_t quotient = value / divisor, digit = value - quotient * divisor;
  value = quotient;
  return digit;
}
COMPRESS_HD uint32_t take_digit(uint64_t& value, uint32_t divisor) {
  const uint64_t quotient = value / divisor;
  const uint32_t digit = static_cast<uint32_t>(value - quotient * divisor);
  value = quotient;
  return digit;
}
COMPRESS_HD uint32_t take_digit(Wide& value, uint32_t divisor) {
  const uint32_t parts[4] = {static_cast<uint32_t>(value.high >> 32), static_cast<uint32_t>(value.high),
                             static_cast<uint32_t>(value.low >> 32), static_cast<uint32_t>(value.low)};
  uint64_t quotient[4], digit = 0;
  for (int i = 0; i < 4; ++i) {
    const uint64_t here = digit << 32 | parts[i];
    quotient[i] = here / divisor;
    digit = here - quotient[i] * divisor;
  }
  value = {quotient[2] << 32 | quotient[3], quotient[0] << 32 | quotient[1]};
  return static_cast<uint32_t>(digit);
}

// One digit of 32 bits of a long division: top < divisor, whose highest bit is set; top becomes the remainder.
COMPRESS_HD uint64_t long_division_step(uint64_t& top, uint64_t next, uint64_t divisor) {
  const uint64_t leading = divisor >> 32, trailing = divisor & 0xffffffffu;
  uint64_t digit = top / leading, left = top - digit * leading;
  while (digit >> 32 || digit * trailing > (left << 32 | next)) {
    --digit;
    left += leading;
    if (left >> 32) break;
  }
  top = (top << 32 | next) - digit * divisor;
  return digit;
}

COMPRESS_HD Wide shift_left(Wide a, int bits) {
  return bits ? Wide{a.low << bits, a.high << bits | a.low >> (64 - bits)} : a;
}

// The two ranks of a pair: value = left count + right, where left fits the halves' type.
COMPRESS_HD uint32_t split_pair(uint32_t value, uint32_t count, uint32_t& right) {
  const uint32_t left = value / count;
  right = value - left * count;
  return left;
}
COMPRESS_HD uint32_t split_pair(uint64_t value, uint32_t count, uint32_t& right) {
  const uint64_t left = value / count;
  right = static_cast<uint32_t>(value - left * count);
  return static_cast<uint32_t>(left);
}
COMPRESS_HD uint64_t split_pair(uint64_t value, uint64_t count, uint64_t& right) {
  const uint64_t left = value / count;
  right = value - left * count;
  return left;
}
COMPRESS_HD uint64_t split_pair(Wide value, uint64_t count, uint64_t& right) {
  int shift = 0;
  for (; !(count >> 63); count <<= 1) ++shift;
  uint64_t top = shift ? value.high << shift | value.low >> (64 - shift) : value.high;
  const uint64_t low = value.low << shift;
  const uint64_t first = long_division_step(top, low >> 32, count);
  const uint64_t second = long_division_step(top, low & 0xffffffffu, count);
  right = top >> shift;
  return first << 32 | second;
}
// A divisor of two words is cut to its 64 highest bits: half the value over that is, taken down by one, the quotient or
// one less.
COMPRESS_HD Wide split_pair(Wide value, Wide count, Wide& right) {
  uint64_t rest;
  if (count.high == 0) {
    const uint64_t high = value.high / count.low;
    const uint64_t low = split_pair(Wide{value.low, value.high % count.low}, count.low, rest);
    right = {rest, 0};
    return {low, high};
  }
  int shift = 0;
  while (!(count.high << shift >> 63)) ++shift;
  const Wide half = {value.low >> 1 | value.high << 63, value.high >> 1};
  uint64_t left = split_pair(half, shift_left(count, shift).high, rest) >> (63 - shift);
  left -= left > 0;
  const Wide taken = product(left, count.low);
  right = minus(value, {taken.low, taken.high + left * count.high});
  if (at_least(right, count)) {
    right = minus(right, count);
    ++left;
  }
  return {left, 0};
}

// The integer that holds a rank and a rest of D coordinates: four bits each.
template <int D>
struct RankOf;
template <>
struct RankOf<4> {
  using Type = uint32_t;
};
template <>
struct RankOf<8> {
  using Type = uint32_t;
};
template <>
struct RankOf<16> {
  using Type = uint64_t;
};
template <>
struct RankOf<32> {
  using Type = Wide;
};
template <int D>
using Rank = typename RankOf<D>::Type;
// Of a group (`kTop`), or of D of its coordinates.
template <int D, bool kTop, bool kDeep>
using PartRank = Rank<(kDeep && !kTop && D > 4) ? 2 * D : D>;

// The tables of a shape, made by compress/ops/half_pyramid/tables.py. `words` holds, for d = 4, 8, 16 below D, N_d(k)
// of k = 0..K and T_d(k, .), K + 1 rows of `stride`; then T_D(K, .), `stride` low and `stride` high words. A row is
// filled up with the largest integer to a power of two, `stride`, so that a search takes the same steps everywhere. At
// the end a deep pyramid of 32 has the high words of d = 16, for which the others have no need.
struct HalfTables {
  int pulses, limit, stride;
  const uint64_t* words;
  const uint16_t* quads;                 // all compositions into four parts, a nibble each, by sum and rank
  const uint32_t* quad_starts;           // where those of a sum begin: k = 0..K+1
  const uint32_t* deep_quads = nullptr;  // instead of quads: the nibbles, and the fifth bits from bit 16 on

  COMPRESS_HD int block() const { return (pulses + 1) * (stride + 1); }
  COMPRESS_HD const uint64_t* counts(int place) const { return words + place * block(); }
  COMPRESS_HD const uint64_t* first(int place, int k) const { return counts(place) + pulses + 1 + k * stride; }
  // How far behind its low word the high one of a number lies, where it has one.
  COMPRESS_HD int apart(bool top) const { return top ? stride : block() + 2 * stride; }
};

template <int D>
constexpr int kPlace = D == 4    ? 0
                       : D == 8  ? 1
                       : D == 16 ? 2
                                 : 3;

COMPRESS_HD void first_rank(const uint64_t* row, int, int at, uint32_t& rank) { rank = static_cast<uint32_t>(row[at]); }
COMPRESS_HD void first_rank(const uint64_t* row, int, int at, uint64_t& rank) { rank = row[at]; }
COMPRESS_HD void first_rank(const uint64_t* row, int apart, int at, Wide& rank) { rank = {row[at], row[apart + at]}; }

// The last place of a row of first ranks that is not above the rank, with the rank there.
template <class Integer>
COMPRESS_HD int find_sum(const uint64_t* row, int stride, int apart, Integer rank, Integer& first) {
  int at = 0;
  for (int step = stride >> 1; step > 0; step >>= 1) {
    Integer here;
    first_rank(row, apart, at + step, here);
    at += at_least(rank, here) ? step : 0;
  }
  first_rank(row, apart, at, first);
  return at;
}

COMPRESS_HD uint32_t spread_nibbles(uint32_t quad) {
  const uint32_t pairs = (quad | quad << 8) & 0x00ff00ffu;
  return (pairs | pairs << 4) & 0x0f0f0f0fu;
}

// The octets of the composition of k with this rank, which must be below N_D(k). Inner halves have their rows in a
// table of all sums, the whole group its only row behind it (`kTop`).
template <int D, bool kTop = true, bool kDeep = false>
COMPRESS_HD void unrank_compositions(const HalfTables& tables, PartRank<D, kTop, kDeep> rank, int k, uint32_t* octets,
                                     uint8_t* tops = nullptr) {
  const uint64_t* row = kTop ? tables.counts(kPlace<D>) : tables.first(kPlace<D>, k);
  PartRank<D, kTop, kDeep> first;
  const int sum = find_sum(row, tables.stride, tables.apart(kTop), rank, first);
  PartRank<D / 2, false, kDeep> count, right;
  first_rank(tables.counts(kPlace<D> - 1), tables.apart(false), k - sum, count);
  const auto left = split_pair(minus(rank, first), count, right);
  if constexpr (D == 8) {
    const uint32_t low_place = tables.quad_starts[sum] + left, high_place = tables.quad_starts[k - sum] + right;
    const uint32_t low = kDeep ? tables.deep_quads[low_place] : tables.quads[low_place];
    const uint32_t high = kDeep ? tables.deep_quads[high_place] : tables.quads[high_place];
    octets[0] = spread_nibbles(low & 0xffffu) | spread_nibbles(high & 0xffffu) << 4;
    if constexpr (kDeep) tops[0] = static_cast<uint8_t>(low >> 16 | high >> 16 << 4);
  } else {
    unrank_compositions<D / 2, false, kDeep>(tables, left, sum, octets, tops);
    unrank_compositions<D / 2, false, kDeep>(tables, right, k - sum, octets + D / 16, kDeep ? tops + D / 16 : nullptr);
  }
}

template <int D>
COMPRESS_HD int sum_of(const int* m) {
  int sum = 0;
  for (int i = 0; i < D; ++i) sum += m[i];
  return sum;
}

// Compositions of k into two parts, and the rank of that which begins with a.
COMPRESS_HD uint32_t pairs_of(int k, int limit) {
  return static_cast<uint32_t>(k <= limit ? k + 1 : k <= 2 * limit ? 2 * limit - k + 1 : 0);
}
COMPRESS_HD uint32_t rank_pair(int a, int k, int limit) {
  return static_cast<uint32_t>(k <= limit ? a : a - (k - limit));
}

// first + left count + right, the inverse of `split_pair`.
template <class Whole, class Half>
COMPRESS_HD Whole join_pair(Whole first, Half left, Half count, Half right) {
  return first + static_cast<Whole>(left) * static_cast<Whole>(count) + static_cast<Whole>(right);
}
COMPRESS_HD Wide join_pair(Wide first, uint64_t left, uint64_t count, uint64_t right) {
  return plus(plus(first, product(left, count)), Wide{right, 0});
}
COMPRESS_HD Wide join_pair(Wide first, Wide left, Wide count, Wide right) {
  const Wide low = product(left.low, count.low);
  return plus(plus(first, {low.low, low.high + left.high * count.low + left.low * count.high}), right);
}

// The rank of m[D] >= 0 among the compositions of its sum; the whole group (`kTop`) must have K pulses, none above M.
template <int D, bool kTop = true, bool kDeep = false>
COMPRESS_HD PartRank<D, kTop, kDeep> rank_compositions(const HalfTables& tables, const int* m) {
  const int left_sum = sum_of<D / 2>(m), right_sum = sum_of<D / 2>(m + D / 2);
  const uint64_t* row = kTop ? tables.counts(kPlace<D>) : tables.first(kPlace<D>, left_sum + right_sum);
  PartRank<D, kTop, kDeep> first;
  first_rank(row, tables.apart(kTop), left_sum, first);
  if constexpr (D == 4) {
    const uint32_t left = rank_pair(m[0], left_sum, tables.limit), right = rank_pair(m[2], right_sum, tables.limit);
    return first + left * pairs_of(right_sum, tables.limit) + right;
  } else {
    const auto left = rank_compositions<D / 2, false, kDeep>(tables, m);
    const auto right = rank_compositions<D / 2, false, kDeep>(tables, m + D / 2);
    PartRank<D / 2, false, kDeep> count;
    first_rank(tables.counts(kPlace<D> - 1), tables.apart(false), right_sum, count);
    return join_pair(first, left, count, right);
  }
}

// The `bits` (1, 2, 4, ... 64) of group `index` in a plane.
COMPRESS_HD uint64_t plane_value(const uint8_t* plane, int bits, int64_t index) {
  if (bits < 8) {
    const int64_t bit = index * bits;
    return (plane[bit >> 3] >> (bit & 7)) & ((1u << bits) - 1);
  }
  const uint8_t* bytes = plane + index * (bits >> 3);
  uint64_t value = 0;
  for (int b = 0; b < bits >> 3; ++b) value |= static_cast<uint64_t>(bytes[b]) << (8 * b);
  return value;
}

COMPRESS_HD void add_bits(uint32_t& rest, uint64_t part, int place) { rest |= static_cast<uint32_t>(part) << place; }
COMPRESS_HD void add_bits(uint64_t& rest, uint64_t part, int place) { rest |= part << place; }
COMPRESS_HD void add_bits(Wide& rest, uint64_t part, int place) {
  if (place >= 64) {
    rest.high |= part << (place - 64);
  } else {
    rest.low |= part << place;
    if (place > 0) rest.high |= part >> (64 - place);
  }
}

COMPRESS_HD uint64_t bits_at(uint32_t rest, int place) { return rest >> place; }
COMPRESS_HD uint64_t bits_at(uint64_t rest, int place) { return rest >> place; }
COMPRESS_HD uint64_t bits_at(Wide rest, int place) {
  if (place >= 64) return rest.high >> (place - 64);
  return place > 0 ? rest.low >> place | rest.high << (64 - place) : rest.low;
}

// The rest of group `index`, of `bits` bits: planes of powers of two, descending, the low bits in the first.
template <int D>
COMPRESS_HD Rank<D> read_rest(const uint8_t* const* planes, int bits, int64_t index) {
  Rank<D> rest{};
  int place = 0, plane = 0;
  for (; bits - place >= 64; place += 64) add_bits(rest, plane_value(planes[plane++], 64, index), place);
  for (int width = 32; width > 0; width >>= 1) {
    if (!((bits - place) & width)) continue;
    add_bits(rest, plane_value(planes[plane++], width, index), place);
    place += width;
  }
  return rest;
}

// rest = ((rank gains + gain) 2 + coset): leaves the rank.
template <class Integer>
COMPRESS_HD void split_rest(Integer& rest, int gains, bool with_coset, int& gain, int& coset) {
  const uint32_t cosets = with_coset ? 2u : 1u;
  const uint32_t digit = take_digit(rest, static_cast<uint32_t>(gains) * cosets);
  gain = static_cast<int>(digit / cosets);
  coset = static_cast<int>(digit % cosets);
}

COMPRESS_HD uint32_t join_rest(uint32_t rank, int gains, bool with_coset, int gain, int coset) {
  const uint32_t cosets = with_coset ? 2u : 1u, factor = static_cast<uint32_t>(gains) * cosets;
  return rank * factor + static_cast<uint32_t>(gain) * cosets + static_cast<uint32_t>(coset);
}
COMPRESS_HD uint64_t join_rest(uint64_t rank, int gains, bool with_coset, int gain, int coset) {
  const uint64_t cosets = with_coset ? 2u : 1u, factor = static_cast<uint64_t>(gains) * cosets;
  return rank * factor + static_cast<uint64_t>(gain) * cosets + static_cast<uint64_t>(coset);
}
COMPRESS_HD Wide join_rest(Wide rank, int gains, bool with_coset, int gain, int coset) {
  const uint64_t cosets = with_coset ? 2u : 1u, factor = static_cast<uint64_t>(gains) * cosets;
  const uint64_t digit = static_cast<uint64_t>(gain) * cosets + static_cast<uint64_t>(coset);
  const Wide low = product(rank.low, factor);
  return plus({low.low, low.high + rank.high * factor}, {digit, 0});
}

}  // namespace compress
