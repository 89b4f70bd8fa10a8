// What the driver of the half-integer pyramid's rows (half_pyramid_rows.cpp) and its loops (half_pyramid_blocks.cpp)
// share. The loops are compiled once for each instruction set, so nothing here may be code: the linker would keep one
// copy of it for all.
#pragma once

#include <cstdint>

namespace compress {

// A shape and the tables of compress/ops/half_pyramid/tables.py, as compress/ops/half_pyramid/native.py gives them.
struct HalfCode {
  const uint64_t* words;
  const void* quads;  // uint16_t, of a deep pyramid uint32_t
  const uint32_t* quad_starts;
  const uint32_t* octets;  // of every rank; null where D > 8 or there are too many
  const float* gains;
  const uint8_t* levels;         // 32, zeros behind the last
  uint64_t last_low, last_high;  // the largest rest
  int32_t dim, pulses, limit, stride, gain_count, shift, bits;
};

constexpr int kMostNibble = 15;  // a pyramid whose limit is above it is deep: the fifth bits of its m lie in tops

constexpr int kTileOctets = 512;  // a multiple of kLane
constexpr int kLane = 8;          // tiles are filled up to a multiple of it with octets of gain 0

// Some thousand weights of one row, eight of them an octet.
struct HalfTile {
  alignas(64) uint32_t rests[kTileOctets];
  alignas(64) uint32_t octets[kTileOctets];
  alignas(64) float gains[kTileOctets];
  alignas(64) float shifts[kTileOctets];  // +d or -d
  const uint8_t* signs;                   // in the plane, or a copy of them, filled up
  alignas(64) uint8_t last_signs[kTileOctets];
  alignas(64) uint8_t tops[kTileOctets];  // of a deep pyramid
};

// All take whole lanes. Where the code has a table of octets, a tile comes with rests alone, and the loops look its
// octets, gains and shifts up; a rest that is too large is taken as the last one.
struct HalfLoops {
  // rests of `count` groups of 8 from group `first` on
  void (*read)(const uint8_t* const* planes, int bits, int64_t first, int count, uint32_t* rests);
  // the largest of them
  uint32_t (*largest)(const uint32_t* rests, int count);
  // out[8 i + j] = (row_scale gain_i) v_ij
  void (*scale)(const HalfCode& code, HalfTile& tile, int count, float row_scale, float* out);
};

const HalfLoops* half_loops_base();
const HalfLoops* half_loops_avx2();
const HalfLoops* half_loops_avx512();

}  // namespace compress
