// Matrices of half-integer pyramids: packing and decoding. A row is worked on in tiles of some thousand weights: rests
// are read, looked up or unranked to octets, and the octets scaled. Rows are spread over threads; a row's result does
// not depend on their number.
#include "half_pyramid_rows.h"

#include <cstdint>
#include <cstring>
#include <vector>

#include "api.h"
#include "instructions.h"
#include "half_groups.h"

namespace compress {

const HalfLoops& half_loops_of(int instructions) {
#if defined(COMPRESS_WITH_AVX)
  if (instructions == kAvx512) return *half_loops_avx512();
  if (instructions >= kAvx2) return *half_loops_avx2();
#endif
  (void)instructions;
  return *half_loops_base();
}

namespace {

// As a tile; `count` groups from `first` on.
template <int D, bool kDeep>
bool unrank_tile(const HalfCode& code, const uint8_t* const* planes, int64_t first, int count, HalfTile& tile) {
  constexpr int kOctets = D / 8;
  bool known = true;
  for (int i = 0; i < count; ++i) {
    int gain, coset;
    uint32_t* octets = tile.octets + i * kOctets;
    known &= read_group<D, kDeep>(code, planes, first + i, octets, tile.tops + i * kOctets, gain, coset);
    for (int o = i * kOctets; o < (i + 1) * kOctets; ++o) {
      tile.gains[o] = code.gains[gain];
      tile.shifts[o] = static_cast<float>(coset ? -code.shift : code.shift);
    }
  }
  return known;
}

bool unrank_tile(const HalfCode& code, const uint8_t* const* planes, int64_t first, int count, HalfTile& tile) {
  return for_shape(code,
                   [&](auto dim, auto deep) { return unrank_tile<dim(), deep()>(code, planes, first, count, tile); });
}

// A matrix of packed rows. planes[0] are the signs.
class HalfMatrix {
 public:
  const HalfCode& code;
  const uint8_t* const* planes;
  int64_t columns;
  const HalfLoops& loops;

  int64_t groups() const { return (columns + code.dim - 1) / code.dim; }
  int64_t octets() const { return groups() * (code.dim / 8); }

  // `count` octets of a row from `start` on, filled up to a whole lane with zeros. Returns whether all rests are known.
  bool load(int64_t row, int64_t start, int count, HalfTile& tile) const {
    const int per_group = code.dim / 8;
    const int64_t first = row * groups() + start / per_group;
    bool known = true;
    if (code.octets == nullptr) {
      known = unrank_tile(code, planes + 1, first, count / per_group, tile);
    } else {
      loops.read(planes + 1, code.bits, first, count, tile.rests);
      known = loops.largest(tile.rests, count) <= code.last_low;
    }
    tile.signs = planes[0] + row * octets() + start;
    if (count % kLane != 0) tile.signs = static_cast<const uint8_t*>(memcpy(tile.last_signs, tile.signs, count));
    for (int i = count; i % kLane != 0; ++i) {
      tile.rests[i] = tile.octets[i] = 0;
      tile.last_signs[i] = tile.tops[i] = 0;
      tile.gains[i] = tile.shifts[i] = 0.0f;
    }
    return known;
  }

  // One row in float32; returns whether all its rests were known.
  bool decode(int64_t row, float row_scale, float* out) const {
    HalfTile tile;
    bool known = true;
    for (int64_t start = 0; start < octets(); start += kTileOctets) {
      const int count = tile_length(start);
      known &= load(row, start, count, tile);
      const int64_t left = columns - 8 * start;
      if (left >= 8 * count && count % kLane == 0) {
        loops.scale(code, tile, count, row_scale, out + 8 * start);
      } else {
        float padded[8 * kTileOctets];
        loops.scale(code, tile, whole_lanes(count), row_scale, padded);
        memcpy(out + 8 * start, padded, (left < 8 * count ? left : 8 * count) * sizeof *out);
      }
    }
    return known;
  }

 private:
  static int whole_lanes(int count) { return (count + kLane - 1) / kLane * kLane; }

  int tile_length(int64_t start) const {
    return static_cast<int>(octets() - start < kTileOctets ? octets() - start : kTileOctets);
  }
};

// One group's planes. Returns false when the values are none of the shape's.
template <int D, bool kDeep>
bool rank_group(const HalfCode& code, const uint8_t* places, const int8_t* values, int64_t gain, int64_t coset,
                uint8_t* signs, Rank<D>& rest) {
  if (gain < 0 || gain >= code.gain_count || coset < 0 || coset > (code.shift > 0)) return false;
  const int shift = coset ? -code.shift : code.shift;
  int m[D], sum = 0;
  memset(signs, 0, D / 8);
  for (int i = 0; i < D; ++i) {
    const int bare = values[i] - shift, magnitude = bare < 0 ? -bare : bare;
    m[i] = magnitude < 128 ? places[magnitude] : 255;
    if (m[i] == 255) return false;
    signs[i >> 3] = static_cast<uint8_t>(signs[i >> 3] | (bare < 0) << (i & 7));
    sum += m[i];
  }
  if (sum != code.pulses) return false;
  rest = join_rest(rank_compositions<D, true, kDeep>(tables_of(code), m), code.gain_count, code.shift > 0,
                   static_cast<int>(gain), static_cast<int>(coset));
  return true;
}

void store_part(uint8_t* plane, int width, int64_t group, uint64_t part) {
  if (width < 8) {
    const int64_t bit = group * width;
    plane[bit >> 3] = static_cast<uint8_t>(plane[bit >> 3] | (part & ((1u << width) - 1)) << (bit & 7));
    return;
  }
  for (int b = 0; b < width >> 3; ++b) plane[group * (width >> 3) + b] = static_cast<uint8_t>(part >> (8 * b));
}

template <class Integer>
void store_rest(uint8_t* const* planes, int bits, int64_t group, Integer rest) {
  int place = 0;
  for (; bits - place >= 64; place += 64) store_part(*planes++, 64, group, bits_at(rest, place));
  for (int width = 32; width > 0; width >>= 1) {
    if (!((bits - place) & width)) continue;
    store_part(*planes++, width, group, bits_at(rest, place));
    place += width;
  }
}

constexpr int64_t kRun = 8;  // groups that share no byte with others

template <int D, bool kDeep>
int64_t pack(const HalfCode& code, const int8_t* values, const int64_t* gain, const int64_t* coset, int64_t groups,
             uint8_t* const* planes, int threads) {
  (void)threads;
  std::vector<uint8_t> places(128, 255);
  for (int m = 0; m <= code.limit; ++m) places[code.levels[m]] = static_cast<uint8_t>(m);
  int64_t refused = 0;
#pragma omp parallel for schedule(static) reduction(+ : refused) num_threads(threads)
  for (int64_t run = 0; run < (groups + kRun - 1) / kRun; ++run)
    for (int64_t g = run * kRun; g < groups && g < (run + 1) * kRun; ++g) {
      Rank<D> rest;
      uint8_t* signs = planes[0] + g * (D / 8);
      if (rank_group<D, kDeep>(code, places.data(), values + g * D, gain[g], coset[g], signs, rest))
        store_rest(planes + 1, code.bits, g, rest);
      else
        ++refused;
    }
  return refused;
}

template <int D, bool kDeep>
int64_t unpack(const HalfCode& code, const uint8_t* const* planes, int64_t groups, int8_t* values, int64_t* gain,
               int threads) {
  (void)threads;
  int64_t refused = 0;
#pragma omp parallel for schedule(static) reduction(+ : refused) num_threads(threads)
  for (int64_t g = 0; g < groups; ++g) {
    uint32_t octets[D / 8];
    uint8_t tops[D / 8] = {};
    int level, coset;
    refused += !read_group<D, kDeep>(code, planes + 1, g, octets, tops, level, coset);
    const int shift = coset ? -code.shift : code.shift;
    for (int i = 0; i < D; ++i) {
      const int j = i & 7, nibble = octets[i >> 3] >> (j < 4 ? 8 * j : 8 * j - 28) & 15;
      const int magnitude = code.levels[nibble | (tops[i >> 3] >> j & 1) << 4];
      const bool negative = planes[0][g * (D / 8) + (i >> 3)] >> j & 1;
      values[g * D + i] = static_cast<int8_t>((negative ? -magnitude : magnitude) + shift);
    }
    gain[g] = level;
  }
  return refused;
}

}  // namespace
}  // namespace compress

using compress::HalfCode;

// The planes of groups of values; the planes are zero before. Returns how many groups are none of the shape's.
COMPRESS_API int64_t compress_half_pack(const HalfCode* code, uint8_t* const* planes, const int8_t* values,
                                        const int64_t* gain, const int64_t* coset, int64_t groups, int threads) {
  return compress::for_shape(*code, [&](auto dim, auto deep) {
    return compress::pack<dim(), deep()>(*code, values, gain, coset, groups, planes, threads);
  });
}

// The inverse. Returns the number of groups with a rest that the shape does not have.
COMPRESS_API int64_t compress_half_unpack(const HalfCode* code, const uint8_t* const* planes, int64_t groups,
                                          int8_t* values, int64_t* gain, int threads) {
  return compress::for_shape(*code, [&](auto dim, auto deep) {
    return compress::unpack<dim(), deep()>(*code, planes, groups, values, gain, threads);
  });
}

// Rows [first, first + rows) of a matrix in float32. Returns how many have a rest that the shape does not have.
COMPRESS_API int64_t compress_half_decode(const HalfCode* code, const uint8_t* const* planes, const float* row_scales,
                                          int64_t first, int64_t rows, int64_t columns, float* out, int instructions,
                                          int threads) {
  (void)threads;
  const compress::HalfMatrix matrix{*code, planes, columns, compress::half_loops_of(instructions)};
  int64_t refused = 0;
#pragma omp parallel for schedule(static) reduction(+ : refused) num_threads(threads)
  for (int64_t r = 0; r < rows; ++r) refused += !matrix.decode(first + r, row_scales[first + r], out + r * columns);
  return refused;
}
