// Matrices of half-integer pyramids: packing, decoding, and products with packed weights. A row is worked on in tiles of
// some thousand weights: rests are read, looked up or unranked to octets, and the octets scaled or multiplied. Rows are
// spread over threads; a row's result does not depend on their number.
#include "half_pyramid_rows.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "api.h"
#include "half_pyramid.cuh"

COMPRESS_API int64_t compress_instructions();

namespace compress {
namespace {

constexpr int kMostRows = 8;  // rows of activations that share the work of decoding

const HalfLoops& loops_of(int instructions) {
#if defined(COMPRESS_WITH_AVX)
  if (instructions == 2 && __builtin_cpu_supports("avx512vnni")) return *half_loops_avx512();
  if (instructions >= 1) return *half_loops_avx2();
#endif
  (void)instructions;
  return *half_loops_base();
}

HalfTables tables_of(const HalfCode& code) {
  return {code.pulses, code.limit, code.stride, code.words, code.quads, code.quad_starts};
}

uint32_t last_rest(const HalfCode& code, uint32_t) { return static_cast<uint32_t>(code.last_low); }
uint64_t last_rest(const HalfCode& code, uint64_t) { return code.last_low; }
Wide last_rest(const HalfCode& code, Wide) { return {code.last_low, code.last_high}; }

// The parts of one group's rest. Returns whether there is such a rest; if not, the last one is taken.
template <int D>
bool read_group(const HalfCode& code, const uint8_t* const* planes, int64_t group, uint32_t* octets, int& gain,
                int& coset) {
  auto rest = read_rest<D>(planes, code.bits, group);
  const auto last = last_rest(code, rest);
  const bool known = at_least(last, rest);
  if (!known) rest = last;
  split_rest(rest, code.gain_count, code.shift > 0, gain, coset);
  unrank_compositions<D>(tables_of(code), rest, code.pulses, octets);
  return known;
}

// As a tile; `count` groups from `first` on.
template <int D>
bool unrank_tile(const HalfCode& code, const uint8_t* const* planes, int64_t first, int count, HalfTile& tile) {
  constexpr int kOctets = D / 8;
  bool known = true;
  for (int i = 0; i < count; ++i) {
    int gain, coset;
    known &= read_group<D>(code, planes, first + i, tile.octets + i * kOctets, gain, coset);
    for (int o = i * kOctets; o < (i + 1) * kOctets; ++o) {
      tile.gains[o] = code.gains[gain];
      tile.shifts[o] = static_cast<float>(coset ? -code.shift : code.shift);
    }
  }
  return known;
}

bool unrank_tile(const HalfCode& code, const uint8_t* const* planes, int64_t first, int count, HalfTile& tile) {
  if (code.dim == 8) return unrank_tile<8>(code, planes, first, count, tile);
  if (code.dim == 16) return unrank_tile<16>(code, planes, first, count, tile);
  return unrank_tile<32>(code, planes, first, count, tile);
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

  // `count` octets of a row from `start` on, filled up to a whole lane with zeros, which meet zeros of the activations.
  // Returns whether all rests are known; does not look where there are a table and no `checked`.
  bool load(int64_t row, int64_t start, int count, HalfTile& tile, bool checked) const {
    const int per_group = code.dim / 8;
    const int64_t first = row * groups() + start / per_group;
    bool known = true;
    if (code.octets == nullptr) {
      known = unrank_tile(code, planes + 1, first, count / per_group, tile);
    } else {
      loops.read(planes + 1, code.bits, first, count, tile.rests);
      known = !checked || loops.largest(tile.rests, count) <= code.last_low;
    }
    tile.signs = planes[0] + row * octets() + start;
    if (count % kLane != 0) tile.signs = static_cast<const uint8_t*>(memcpy(tile.last_signs, tile.signs, count));
    for (int i = count; i % kLane != 0; ++i) {
      tile.rests[i] = tile.octets[i] = 0;
      tile.last_signs[i] = 0;
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
      known &= load(row, start, count, tile, true);
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

  // One row times `rows` rows of activations, before the row's scale.
  template <bool kIntegers>
  void multiply(int64_t row, const HalfInputs& x, int rows, float* sums) const {
    HalfTile tile;
    for (int r = 0; r < rows; ++r) sums[r] = 0.0f;
    for (int64_t start = 0; start < octets(); start += kTileOctets) {
      const int count = tile_length(start);
      load(row, start, count, tile, false);
      (kIntegers ? loops.dot_integers : loops.dot_floats)(code, tile, whole_lanes(count), x, start, rows, sums);
    }
  }

 private:
  static int whole_lanes(int count) { return (count + kLane - 1) / kLane * kLane; }

  int tile_length(int64_t start) const {
    return static_cast<int>(octets() - start < kTileOctets ? octets() - start : kTileOctets);
  }
};

// Up to eight rows of activations as the loops want them. Integers are round(x / step), half to even.
struct Activations {
  std::vector<float> floats, sums, steps;
  std::vector<int8_t> integers;
  HalfInputs inputs;

  Activations(const HalfMatrix& matrix, const float* x, int rows, int held, bool as_integers) {
    const int64_t octets = (matrix.octets() + kLane - 1) / kLane * kLane;
    sums.resize(held * octets);
    steps.assign(held, 1.0f);
    if (as_integers)
      integers.resize(held * octets * 8);
    else
      floats.resize(held * octets * 8);
    std::vector<float> row(octets * 8);
    std::vector<int8_t> rounded(as_integers ? octets * 8 : 0);
    for (int r = 0; r < rows; ++r) {
      memcpy(row.data(), x + r * matrix.columns, matrix.columns * sizeof *x);
      if (as_integers) {
        steps[r] = round_to_integers(row, rounded.data());
        matrix.loops.arrange_integers(rounded.data(), octets, integers.data() + r * octets * 8);
      } else {
        matrix.loops.arrange_floats(row.data(), octets, floats.data() + r * octets * 8);
      }
      for (int64_t i = 0; i < octets; ++i) sums[r * octets + i] = sum_of_octet(row.data() + 8 * i);
    }
    inputs = {floats.data(), integers.data(), sums.data(), octets};
  }

 private:
  static float sum_of_octet(const float* x) {
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
  }

  // Leaves the integers in x as well. The step of a row that is not finite is no number.
  static float round_to_integers(std::vector<float>& x, int8_t* out) {
    constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23: what is added to it and taken off again is rounded
    float most = 0.0f, spoilt = 0.0f;
    for (const float v : x) {
      const float magnitude = v < 0.0f ? -v : v;
      most = magnitude > most ? magnitude : most;
      spoilt += v * 0.0f;
    }
    const float step = most / 127.0f;
    for (size_t i = 0; i < x.size(); ++i) {
      float q = step > 0.0f ? x[i] / step : 0.0f;
      q = q < 127.0f ? q : 127.0f;  // a step without all its bits
      q = q > -127.0f ? q : -127.0f;
      x[i] = (q + kWhole) - kWhole;
      out[i] = static_cast<int8_t>(x[i]);
    }
    return step + spoilt;
  }
};

template <bool kIntegers>
void multiply_all(const HalfMatrix& matrix, const Activations& x, const float* row_scales, int64_t out_rows, int rows,
                  int held, float* y, int threads) {
  (void)threads;
#pragma omp parallel for schedule(dynamic, 64) num_threads(threads)
  for (int64_t o = 0; o < out_rows; ++o) {
    float sums[kMostRows];
    matrix.multiply<kIntegers>(o, x.inputs, held, sums);
    for (int r = 0; r < rows; ++r) y[r * out_rows + o] = sums[r] * row_scales[o] * x.steps[r];
  }
}

// One group's planes. Returns false when the values are none of the shape's.
template <int D>
bool rank_group(const HalfCode& code, const uint8_t* places, const int8_t* values, int64_t gain, int64_t coset, uint8_t* signs,
                Rank<D>& rest) {
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
  rest = join_rest(rank_compositions<D>(tables_of(code), m), code.gain_count, code.shift > 0,
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

template <int D>
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
      if (rank_group<D>(code, places.data(), values + g * D, gain[g], coset[g], planes[0] + g * (D / 8), rest))
        store_rest(planes + 1, code.bits, g, rest);
      else
        ++refused;
    }
  return refused;
}

template <int D>
int64_t unpack(const HalfCode& code, const uint8_t* const* planes, int64_t groups, int8_t* values, int64_t* gain,
               int threads) {
  (void)threads;
  int64_t refused = 0;
#pragma omp parallel for schedule(static) reduction(+ : refused) num_threads(threads)
  for (int64_t g = 0; g < groups; ++g) {
    uint32_t octets[D / 8];
    int level, coset;
    refused += !read_group<D>(code, planes + 1, g, octets, level, coset);
    const int shift = coset ? -code.shift : code.shift;
    for (int i = 0; i < D; ++i) {
      const uint32_t octet = octets[i >> 3];
      const int j = i & 7, magnitude = code.levels[octet >> (j < 4 ? 8 * j : 8 * j - 28) & 15];
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

// The planes of groups of values; the planes are zero before. Returns the number of groups that are none of the shape's.
COMPRESS_API int64_t compress_half_pack(const HalfCode* code, uint8_t* const* planes, const int8_t* values,
                                        const int64_t* gain, const int64_t* coset, int64_t groups, int threads) {
  const auto pack = code->dim == 8 ? compress::pack<8> : code->dim == 16 ? compress::pack<16> : compress::pack<32>;
  return pack(*code, values, gain, coset, groups, planes, threads);
}

// The inverse. Returns the number of groups with a rest that the shape does not have.
COMPRESS_API int64_t compress_half_unpack(const HalfCode* code, const uint8_t* const* planes, int64_t groups,
                                          int8_t* values, int64_t* gain, int threads) {
  const auto unpack =
      code->dim == 8 ? compress::unpack<8> : code->dim == 16 ? compress::unpack<16> : compress::unpack<32>;
  return unpack(*code, planes, groups, values, gain, threads);
}

// Rows [first, first + rows) of a matrix in float32. Returns the number of rows with a rest that the shape does not have.
COMPRESS_API int64_t compress_half_decode(const HalfCode* code, const uint8_t* const* planes, const float* row_scales,
                                          int64_t first, int64_t rows, int64_t columns, float* out, int instructions,
                                          int threads) {
  (void)threads;
  const compress::HalfMatrix matrix{*code, planes, columns, compress::loops_of(instructions)};
  int64_t refused = 0;
#pragma omp parallel for schedule(static) reduction(+ : refused) num_threads(threads)
  for (int64_t r = 0; r < rows; ++r)
    refused += !matrix.decode(first + r, row_scales[first + r], out + r * columns);
  return refused;
}

// y [rows, out_rows] = x [rows, columns] times the matrix, transposed. A rest that the shape does not have counts as its
// last one. Returns 0, or 1 when there is not enough memory.
COMPRESS_API int64_t compress_half_linear(const HalfCode* code, const uint8_t* const* planes, const float* row_scales,
                                          int64_t out_rows, int64_t columns, const float* x, int64_t rows,
                                          int as_integers, float* y, int instructions, int threads) {
  const compress::HalfMatrix matrix{*code, planes, columns, compress::loops_of(instructions)};
  try {
    for (int64_t done = 0; done < rows; done += compress::kMostRows) {
      const int here = static_cast<int>(rows - done < compress::kMostRows ? rows - done : compress::kMostRows);
      const int held = here <= 2 ? here : here <= 4 ? 4 : compress::kMostRows;
      const compress::Activations activations(matrix, x + done * columns, here, held, as_integers != 0);
      const auto multiply = as_integers ? compress::multiply_all<true> : compress::multiply_all<false>;
      multiply(matrix, activations, row_scales, out_rows, here, held, y + done * out_rows, threads);
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
