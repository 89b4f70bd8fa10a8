// A packed matrix as kernels see it: planes, tables in shared memory, and the groups of a unit of 64 weights.
#pragma once

#include "half_octets.cuh"

#include "gpu.cuh"

#if !defined(HALF_TABLE)  // words of 4 bytes of the direct table; words of 8 and quads of 2 of the others
#define HALF_TABLE 18728
#define HALF_WORDS 0
#define HALF_QUADS 0
#endif

// The arguments that all kernels begin with, and how they become a Source.
#define HALF_ARGUMENTS                                                                                                 \
  const uint8_t *signs, const uint8_t *q0, const uint8_t *q1, const uint8_t *q2, const uint8_t *q3, const uint8_t *q4, \
      const uint8_t *q5, const uint8_t *q6, const uint32_t *octets, const uint64_t *words, const uint16_t *quads,      \
      const uint32_t *quad_starts, const uint32_t *lookups, const uint32_t *gains
#define HALF_SOURCE(memory)                                                                            \
  compress::Source source{{signs, {q0, q1, q2, q3, q4, q5, q6}},                                       \
                          {octets, {HALF_PULSES, HALF_LIMIT, HALF_STRIDE, words, quads, quad_starts}}, \
                          {},                                                                          \
                          nullptr};                                                                    \
  uint4* const free_memory = source.fill(memory, lookups, gains)

namespace compress {

constexpr int kGroupsOfUnit = kUnit / kOctets;
constexpr int kStarts = (HALF_PULSES + 2 + 3) / 4 * 4, kDigitWords = (2 * (kDigits + 1) + 3) / 4 * 4;

struct Unit {
#if HALF_WHOLE
  UnitBits bits;
#else
  int64_t first;  // group
  int count;      // of groups, at most kGroupsOfUnit
#endif
};

__device__ __forceinline__ Digit digit_of(uint32_t digit, uint32_t gain) {
#if HALF_PAIRS
  const float shift = kCosets == 2 && digit % 2 == 1 ? -HALF_SHIFT : HALF_SHIFT;
  const uint32_t bits = Float16::bits(Float16::number(static_cast<uint16_t>(gain)) * shift);
  return {gain, bits | bits << 16};
#else
  return {gain, shifts_of(digit)};
#endif
}

struct Source {
  Planes planes;
  Compositions from;
  Lookups lookups;
  const Digit* digits;  // the gain of that behind the last is 0

  // Copies the tables to shared memory; returns what lies behind them. Ends without a barrier.
  __device__ __forceinline__ uint4* fill(uint4* memory, const uint32_t* words, const uint32_t* gains) {
    lookups = {{words[0], words[1], words[2], words[3]}, words[4], {words[5], words[6]}, {words[7], words[8]}};
    Digit* by_digit = reinterpret_cast<Digit*>(memory);
    for (uint32_t i = threadIdx.x; i <= kDigits; i += blockDim.x)
      by_digit[i] = digit_of(i, i < kDigits ? gains[i / kCosets] : 0u);
    digits = by_digit;
    memory += kDigitWords / 4;
#if HALF_DIRECT
    start_copy(memory, reinterpret_cast<const uint4*>(from.octets), HALF_TABLE / 4);
    from.octets = reinterpret_cast<const uint32_t*>(memory);
    memory += HALF_TABLE / 4;
#elif HALF_SHARED
    start_copy(memory, reinterpret_cast<const uint4*>(from.tables.words), HALF_WORDS / 2);
    from.tables.words = reinterpret_cast<const uint64_t*>(memory);
    memory += HALF_WORDS / 2;
    start_copy(memory, reinterpret_cast<const uint4*>(from.tables.quads), HALF_QUADS / 8);
    from.tables.quads = reinterpret_cast<const uint16_t*>(memory);
    memory += HALF_QUADS / 8;
    start_copy(memory, reinterpret_cast<const uint4*>(from.tables.quad_starts), kStarts / 4);
    from.tables.quad_starts = reinterpret_cast<const uint32_t*>(memory);
    memory += kStarts / 4;
#endif
    return memory;
  }

  // Starts to read unit `place` of a row; beyond the row's end it is empty.
  __device__ __forceinline__ Unit read(int64_t row, int groups_of_row, int place) const {
    Unit unit;
    const int first = place * kGroupsOfUnit;
#if HALF_WHOLE
    if (first < groups_of_row)
      unit.bits = read_unit(planes, static_cast<uint32_t>(row) * static_cast<uint32_t>(groups_of_row / kUnit) + place);
    else
      unit.bits = UnitBits{};
#else
    unit.first = row * groups_of_row + first;
    unit.count = min(max(groups_of_row - first, 0), kGroupsOfUnit);
#endif
    return unit;
  }

  // Octets and selectors of group i of the unit; returns its digit.
  __device__ __forceinline__ uint32_t decode(const Unit& unit, int i, uint32_t* octets, uint32_t* selectors) const {
#if HALF_WHOLE
    selectors[0] = unit_selector(unit.bits, i);
    return octets_of(from, unit_rest(unit.bits, i), octets);
#else
    if (i >= unit.count) {
      for (int h = 0; h < kOctets; ++h) octets[h] = selectors[h] = 0;
      return kDigits;
    }
    return decode_group(unit.first + i, octets, selectors);
#endif
  }

  __device__ __forceinline__ uint32_t decode_group(int64_t group, uint32_t* octets, uint32_t* selectors) const {
    for (int h = 0; h < kOctets; ++h) selectors[h] = selector_of(planes.signs[group * kOctets + h]);
    return octets_of(from, rest_of(planes, group), octets);
  }
};

}  // namespace compress
