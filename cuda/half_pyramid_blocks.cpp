// The loops over the octets of a tile, for one instruction set: COMPRESS_INSTRUCTIONS names it, the compiler's options
// choose it. Nothing that another file might define as well is used here: the linker could keep the copy with
// instructions that a machine lacks. So what each set does its own way lies in a header of static functions, and this
// file holds what all have in common.
#include <cstring>

#include "half_pyramid_rows.h"

#define COMPRESS_JOIN_(a, b) a##b
#define COMPRESS_JOIN(a, b) COMPRESS_JOIN_(a, b)

namespace compress {
namespace {

// Adds the `bits` (at most 4) of each group at `place`, one by one.
void read_narrow(const uint8_t* plane, int bits, int64_t first, int begin, int end, int place, uint32_t* rests) {
  for (int i = begin; i < end; ++i) {
    const int64_t bit = (first + i) * bits;
    const uint32_t part = (plane[bit >> 3] >> (bit & 7)) & ((1u << bits) - 1);
    rests[i] |= part << place;
  }
}

template <class Part>
void read_wide(const uint8_t* plane, int64_t first, int count, int place, uint32_t* rests) {
  const uint8_t* bytes = plane + first * static_cast<int64_t>(sizeof(Part));
  for (int i = 0; i < count; ++i) {
    Part part;
    memcpy(&part, bytes + i * sizeof(Part), sizeof(Part));
    rests[i] |= static_cast<uint32_t>(part) << place;
  }
}

uint32_t largest(const uint32_t* rests, int count) {
  uint32_t most = 0;
  for (int i = 0; i < count; ++i) most = rests[i] > most ? rests[i] : most;
  return most;
}

}  // namespace
}  // namespace compress

#if defined(__AVX2__)
#include "half_pyramid_avx2.h"
#else
#include "half_pyramid_base.h"
#endif

namespace compress {
namespace {

// Little-endian words, which all machines that this is built for have.
void read(const uint8_t* const* planes, int bits, int64_t first, int count, uint32_t* rests) {
  memset(rests, 0, count * sizeof *rests);
  int place = 0;
  if (bits & 32) read_wide<uint32_t>(*planes++, first, count, 0, rests);
  if (bits & 16) read_wide<uint16_t>(*planes++, first, count, 0, rests), place += 16;
  if (bits & 8) read_wide<uint8_t>(*planes++, first, count, place, rests), place += 8;
  for (int width = 4; width > 0; width >>= 1) {
    if (!(bits & width)) continue;
    const uint8_t* plane = *planes++;
    int begin = static_cast<int>(-first & (8 / width - 1));  // groups up to a whole byte
    begin = begin < count ? begin : count;
    read_narrow(plane, width, first, 0, begin, place, rests);
    const int end = read_whole_bytes(plane + (first + begin) * width / 8, width, begin, count, place, rests);
    read_narrow(plane, width, first, end, count, place, rests);
    place += width;
  }
}

void scale(const HalfCode& code, HalfTile& tile, int count, float row_scale, float* out) {
  (code.limit > kMostNibble ? scale_of<true> : scale_of<false>)(code, tile, count, row_scale, out);
}

constexpr HalfLoops kLoops = {read, largest, scale};

}  // namespace

const HalfLoops* COMPRESS_JOIN(half_loops_, COMPRESS_INSTRUCTIONS)() { return &kLoops; }

}  // namespace compress
