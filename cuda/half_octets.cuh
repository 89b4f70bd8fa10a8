// How a GPU thread decodes the half-integer pyramid: eight weights of a group at a time, an octet, as two words of
// bytes.
//
// The shape is known when a kernel is compiled (compress/ops/cuda/half_pyramid.py defines the macros), so that the
// division by the gains is a multiplication and the levels are immediate operands. The weights of an octet come in the
// order of its nibbles, 0 4 1 5 and 2 6 3 7; activations are arranged in the same order. Four nibbles are at once the
// selector of a byte permutation, which looks up four levels in one instruction. The masks of the signs come from two
// more: with s the byte of signs, the nibbles of s | (s >> 1) << 8 hold the signs 0 4 1 5 in their lowest bits and
// 2 6 3 7 in their third, and a permutation of constants replicates either to bytes.
#pragma once

#include "half_pyramid.cuh"
#include "half_shape.cuh"
#include "words.cuh"

namespace compress {

constexpr int kDim = HALF_DIM, kRest = HALF_REST, kOctets = kDim / 8;  // octets of a group
constexpr uint32_t kCosets = HALF_SHIFT > 0 ? 2 : 1, kDigits = HALF_GAINS * kCosets;
constexpr uint32_t kBytes = 0x01010101u, kBias = 0x80808080u;
constexpr uint32_t kShifts = HALF_SHIFT * kBytes;
constexpr int kUnit = 8;  // octets that a thread reads at once

struct Planes {
  const uint8_t* signs;
  const uint8_t* rest[7];
};

// Operands of the byte permutations. They are read from memory, since of constants a compiler copies all but one into
// registers before every permutation.
struct Lookups {
  uint32_t levels[4];
  uint32_t odd;                            // 0xff00ff00
  uint32_t low_halves[2], high_halves[2];  // bytes of the first eight levels as float16
};

// Level bytes of four nibbles. Levels are below 128, so a nibble whose highest bit is set selects 0 of a permutation.
COMPRESS_HD uint32_t levels_of(const Lookups& from, uint32_t nibbles) {
  const uint32_t low = permute_bytes(from.levels[0], from.levels[1], nibbles);
#if HALF_LIMIT > 7
  return low | permute_bytes(from.levels[2], from.levels[3], nibbles ^ 0x8888u);
#else
  return low;
#endif
}

// Four bytes s t + e d + bias, where no sum leaves its byte: with a bias of 128, or where no s t + e d changes its
// sign.
COMPRESS_HD uint32_t shifted_bytes(uint32_t levels, uint32_t mask, uint32_t shifts, uint32_t bias) {
  return (levels ^ mask ^ bias) + (mask & kBytes) + shifts;
}

struct OctetBytes {
  uint32_t low, high;  // weights 0 4 1 5 and 2 6 3 7
};

// What a digit = gain * cosets + coset stands for: the gain (a float or a pair of float16), and four bytes e d or a
// pair of gain e d.
struct Digit {
  uint32_t gain, shifts;
};

COMPRESS_HD uint32_t shifts_of(uint32_t digit) { return kCosets == 2 && digit % 2 == 1 ? 0u - kShifts : kShifts; }

// The masks of an octet's signs; selector: s | (s >> 1) << 8 of the byte s of signs.
COMPRESS_HD OctetBytes sign_masks(const Lookups& from, uint32_t selector) {
  return {permute_bytes(from.odd, from.odd, selector), permute_bytes(0, 0xffffffffu, selector)};
}

template <bool kBiased>
COMPRESS_HD OctetBytes octet_bytes(const Lookups& from, uint32_t octet, uint32_t selector, uint32_t shifts) {
  constexpr bool crosses = HALF_LOWEST <= HALF_SHIFT;
  constexpr uint32_t bias = kBiased || crosses ? kBias : 0, unbias = kBiased ? 0 : bias;
  const OctetBytes masks = sign_masks(from, selector);
  return {shifted_bytes(levels_of(from, octet), masks.low, shifts, bias) ^ unbias,
          shifted_bytes(levels_of(from, octet >> 16), masks.high, shifts, bias) ^ unbias};
}

COMPRESS_HD uint32_t selector_of(uint32_t signs) { return (signs & 255u) | (signs & 254u) << 7; }

// The part of one group in a plane of 1 to 64 bits; planes are aligned to 16 bytes.
template <int kBits>
COMPRESS_HD uint64_t plane_part(const uint8_t* plane, int64_t group) {
  if constexpr (kBits == 64) return reinterpret_cast<const uint64_t*>(plane)[group];
  if constexpr (kBits == 32) return reinterpret_cast<const uint32_t*>(plane)[group];
  if constexpr (kBits == 16) return reinterpret_cast<const uint16_t*>(plane)[group];
  if constexpr (kBits == 8) return plane[group];
  return plane_value(plane, kBits, group);
}

template <int kLeft, int kPlace, int kPlane>
COMPRESS_HD void add_planes(const Planes& planes, int64_t group, Rank<kDim>& rest) {
  if constexpr (kLeft > 0) {
    constexpr int bits = kLeft >= 64   ? 64
                         : kLeft >= 32 ? 32
                         : kLeft >= 16 ? 16
                         : kLeft >= 8  ? 8
                         : kLeft >= 4  ? 4
                         : kLeft >= 2  ? 2
                                       : 1;
    add_bits(rest, plane_part<bits>(planes.rest[kPlane], group), kPlace);
    add_planes<kLeft - bits, kPlace + bits, kPlane + 1>(planes, group, rest);
  }
}

COMPRESS_HD Rank<kDim> rest_of(const Planes& planes, int64_t group) {
  Rank<kDim> rest{};
  add_planes<kRest, 0, 0>(planes, group, rest);
  return rest;
}

#if HALF_DIM == 32
constexpr Wide kCodes = {HALF_CODES_LOW, HALF_CODES_HIGH};
#else
constexpr Rank<kDim> kCodes = static_cast<Rank<kDim> >(HALF_CODES_LOW);
#endif

// Where compositions come from: a table of all of them, or tables of their halves.
struct Compositions {
  const uint32_t* octets;
  HalfTables tables;
};

// rest / kDigits. The reciprocal, rounded up, is exact while rest (reciprocal kDigits - 2^32) < 2^32.
COMPRESS_HD uint32_t divide_by_digits(uint32_t rest) {
  constexpr uint64_t reciprocal = ((uint64_t{1} << 32) + kDigits - 1) / kDigits;
  constexpr uint64_t excess = reciprocal * kDigits - (uint64_t{1} << 32);
  if constexpr (kDigits > 1 && kRest < 32 && (excess << (kRest % 32)) < (uint64_t{1} << 32))
    return static_cast<uint32_t>(rest * reciprocal >> 32);
  return rest / kDigits;
}

// The octets of the group with this rest; returns its digit.
COMPRESS_HD uint32_t octets_of(const Compositions& from, Rank<kDim> rest, uint32_t* octets) {
  if (!HALF_DIRECT && at_least(rest, kCodes)) rest = Rank<kDim>{};  // damaged; the direct table is long enough for all
#if HALF_DIRECT
  const uint32_t rank = divide_by_digits(rest);
  const uint32_t digit = rest - rank * kDigits;
  octets[0] = from.octets[rank];
#else
  const uint32_t digit = take_digit(rest, kDigits);
  unrank_compositions<kDim>(from.tables, rest, HALF_PULSES, octets);
#endif
  return digit;
}

// The bits of eight groups of eight, whose place in every plane is a multiple of its size.
struct UnitBits {
  static constexpr int kWords = (kRest * kUnit + 31) / 32 + 1;
  uint32_t signs[2];
  uint32_t words[kWords];  // of the planes of 32, 16, 8 and 4 bits, then one for those of 2 and 1
};

COMPRESS_HD constexpr int unit_word(int bits) { return (kRest & ~(2 * bits - 1)) * kUnit / 32; }

COMPRESS_HD uint32_t unit_rest(const UnitBits& unit, int j) {
  uint32_t rest = 0;
  if constexpr ((kRest & 32) != 0) rest = unit.words[j];
  if constexpr ((kRest & 16) != 0)
    rest |= (unit.words[unit_word(16) + j / 2] >> (16 * (j & 1)) & 0xffffu) << (kRest & 32 & 31);
  if constexpr ((kRest & 8) != 0) rest |= (unit.words[unit_word(8) + j / 4] >> (8 * (j & 3)) & 255u) << (kRest & 16);
  if constexpr ((kRest & 4) != 0) rest |= (unit.words[unit_word(4)] >> (4 * j) & 15u) << (kRest & 24);
  const uint32_t narrow = unit.words[UnitBits::kWords - 1];
  if constexpr ((kRest & 2) != 0) rest |= (narrow >> (2 * j) & 3u) << (kRest & 28);
  if constexpr ((kRest & 1) != 0) rest |= (narrow >> (16 + j) & 1u) << (kRest & 30);
  return rest;
}

// Reads the unit that begins at group 8 * place.
COMPRESS_HD UnitBits read_unit(const Planes& planes, uint32_t place) {
  UnitBits unit;
  int plane = 0;
  stream_words<2>(planes.signs + uint64_t{place} * 8, unit.signs);
  if constexpr ((kRest & 32) != 0) stream_words<8>(planes.rest[plane++] + uint64_t{place} * 32, unit.words);
  if constexpr ((kRest & 16) != 0)
    stream_words<4>(planes.rest[plane++] + uint64_t{place} * 16, unit.words + unit_word(16));
  if constexpr ((kRest & 8) != 0)
    stream_words<2>(planes.rest[plane++] + uint64_t{place} * 8, unit.words + unit_word(8));
  if constexpr ((kRest & 4) != 0)
    stream_words<1>(planes.rest[plane++] + uint64_t{place} * 4, unit.words + unit_word(4));
  uint32_t narrow = 0;
  if constexpr ((kRest & 2) != 0) narrow = reinterpret_cast<const uint16_t*>(planes.rest[plane++])[place];
  if constexpr ((kRest & 1) != 0) narrow |= static_cast<uint32_t>(planes.rest[plane][place]) << 16;
  unit.words[UnitBits::kWords - 1] = narrow;
  return unit;
}

// s | (s >> 1) << 8 of sign byte j of eight; the ninth bit that gets in does not count.
COMPRESS_HD uint32_t unit_selector(const UnitBits& unit, int j) {
  const uint32_t word = unit.signs[j / 4], place = static_cast<uint32_t>(j & 3);
  return permute_bytes(word, word >> 1, (4 + place) << 4 | place);
}

}  // namespace compress
