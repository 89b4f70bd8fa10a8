// What the drivers of prepared half-integer pyramids (half_prepared_rows.cpp, half_prepared.cpp) and their loops
// (half_prepared_blocks.cpp) share. The loops are compiled once for each instruction set, so nothing here may be code
// that the linker sees: it would keep one copy for all.
//
// Prepared rows hold the indices of the levels, where the payload has ranks: one to two bits a weight more, and no
// table or division between memory and a product. 256 weights of a row, 32 octets, are one chunk. With g = 0..7 the
// octets of one of its four units, and j = 0..3:
//
//   indices   128 bytes; byte 32 unit + 4 g + j: index of weight j of the octet | that of weight j + 4 << 4
//   signs      32 bytes; byte 4 g + j: bit 2 unit of weight j, bit 2 unit + 1 of weight j + 4
//   uppers     32 bytes; the same with the fifth bits of m
//   digits    4 or 8 bits of each octet: gain, and in the highest bit the coset
//
// Up to eight levels have the sign in the highest bit of the index, and no signs; up to sixteen have no uppers. Digits
// have four bits where there are at most eight gains. A row is filled up to whole chunks with zero bits, which meet
// activations of zero. compress/ops/half_pyramid/prepared.py is the definition.
#pragma once

#include <cstdint>

namespace compress {

// What a shape says about products; compress/ops/half_pyramid/native.py gives it.
struct PreparedCode {
  const float* gains;
  const uint8_t* levels;
  int32_t limit, gain_count, shift;
};

constexpr int kChunkOctets = 32;
constexpr int kUnitOctets = 8;
constexpr int kIndexBytes = 128, kPlaneBytes = 32;  // of a chunk's indices, and of its signs or uppers

// Where the parts of a chunk lie that follow its indices.
struct ChunkLayout {
  int uppers, digits, bytes;
};

static constexpr ChunkLayout chunk_layout(int limit, int gain_count) {
  const int uppers = kIndexBytes + (limit > 7 ? kPlaneBytes : 0), digits = uppers + (limit > 15 ? kPlaneBytes : 0);
  return {uppers, digits, digits + (gain_count > 8 ? kChunkOctets : kChunkOctets / 2)};
}

// Rows of activations, each in the order that the loops want, filled up with zeros to `chunks` chunks.
struct PreparedInputs {
  const float* floats;     // either these
  const int8_t* integers;  // or these
  const float* sums;       // of each octet
  int64_t chunks;
};

struct PreparedLoops {
  // one row of activations, from x [256 chunks]
  void (*arrange_floats)(const float* x, int64_t chunks, float* out);
  void (*arrange_integers)(const int8_t* x, int64_t chunks, int8_t* out);
  // sums [count, rows] of `count` prepared rows: sum over octets of gain (sum over j of v_j x_rj), for `rows` = 1, 2, 4
  // or 8 rows of x
  void (*dot_floats)(const PreparedCode& code, const uint8_t* prepared, int count, const PreparedInputs& x, int rows,
                     float* sums);
  void (*dot_integers)(const PreparedCode& code, const uint8_t* prepared, int count, const PreparedInputs& x, int rows,
                       float* sums);
};

const PreparedLoops* prepared_loops_base();
const PreparedLoops* prepared_loops_avx2();
const PreparedLoops* prepared_loops_avx512();

}  // namespace compress
