// Prepared rows of half-integer pyramids (half_prepared.h): made of a payload once, multiplied with often. Rows are spread
// over threads; a row's result does not depend on their number.
#include "half_prepared.h"

#include <cstring>
#include <new>
#include <vector>

#include "api.h"
#include "half_groups.h"

namespace compress {
namespace {

constexpr int kMostRows = 8;  // rows of activations that share the work of decoding
constexpr int kChunkWeights = 8 * kChunkOctets;

const PreparedLoops& loops_of(int instructions) {
#if defined(COMPRESS_WITH_AVX)
  if (instructions == 2 && __builtin_cpu_supports("avx512vnni")) return *prepared_loops_avx512();
  if (instructions >= 1) return *prepared_loops_avx2();
#endif
  (void)instructions;
  return *prepared_loops_base();
}

int64_t chunks_of(int64_t octets) { return (octets + kChunkOctets - 1) / kChunkOctets; }

// Bytes of the lower and of the upper four bits, each 0 or 1.
uint32_t lower_bytes(uint32_t bits) { return (bits & 15) * 0x00204081u & 0x01010101u; }
uint32_t upper_bytes(uint32_t bits) { return (bits >> 4) * 0x00204081u & 0x01010101u; }

class Preparation {
 public:
  Preparation(const HalfCode& code, const uint8_t* const* planes, int64_t columns, int instructions)
      : code_(code),
        planes_(planes),
        octets_((columns + code.dim - 1) / code.dim * (code.dim / 8)),
        loops_(half_loops_of(instructions)),
        layout_(chunk_layout(code.limit, code.gain_count)) {
    const int cosets = code.shift > 0 ? 2 : 1;
    for (int digit = 0; digit < code.gain_count * cosets; ++digit)
      digits_[digit] = digit_of(digit / cosets, digit % cosets);
  }

  int64_t row_bytes() const { return chunks_of(octets_) * layout_.bytes; }

  // Returns whether all rests of the row are the shape's.
  bool prepare(int64_t row, uint8_t* out) const {
    memset(out, 0, row_bytes());
    bool known = true;
    for (int64_t first = 0; first < octets_; first += kTileOctets) {
      Tile tile;
      const int count = static_cast<int>(octets_ - first < kTileOctets ? octets_ - first : kTileOctets);
      const int64_t place = row * octets_ + first;
      known &= code_.octets ? look_up(place, count, tile) : unrank(place, count, tile);
      for (int i = 0; i < count; ++i)
        store(out + (first + i) / kChunkOctets * layout_.bytes, static_cast<int>((first + i) % kChunkOctets),
              planes_[0][place + i], tile, i);
    }
    return known;
  }

 private:
  struct Tile {
    uint32_t rests[kTileOctets], octets[kTileOctets];
    uint8_t tops[kTileOctets], digits[kTileOctets];
  };

  uint8_t digit_of(int gain, int coset) const {
    return static_cast<uint8_t>(gain | coset << (code_.gain_count > 8 ? 7 : 3));
  }

  bool look_up(int64_t first, int count, Tile& tile) const {
    const uint32_t last = static_cast<uint32_t>(code_.last_low);
    const uint32_t radix = static_cast<uint32_t>(code_.gain_count) * (code_.shift > 0 ? 2 : 1);
    loops_.read(planes_ + 1, code_.bits, first, count, tile.rests);
    for (int i = 0; i < count; ++i) {
      const uint32_t rest = tile.rests[i] < last ? tile.rests[i] : last, rank = rest / radix;
      tile.octets[i] = code_.octets[rank];
      tile.digits[i] = digits_[rest - rank * radix];
    }
    return loops_.largest(tile.rests, count) <= last;
  }

  bool unrank(int64_t first, int count, Tile& tile) const {
    return for_shape(code_, [&](auto dim, auto deep) { return unrank<dim(), deep()>(first, count, tile); });
  }

  template <int D, bool kDeep>
  bool unrank(int64_t first, int count, Tile& tile) const {
    constexpr int kOctets = D / 8;
    bool known = true;
    for (int i = 0; i < count; i += kOctets) {
      int gain, coset;
      const int64_t group = (first + i) / kOctets;
      known &= read_group<D, kDeep>(code_, planes_ + 1, group, tile.octets + i, tile.tops + i, gain, coset);
      memset(tile.digits + i, digit_of(gain, coset), kOctets);
    }
    return known;
  }

  void store(uint8_t* chunk, int octet, uint32_t signs, const Tile& tile, int i) const {
    const int unit = octet / kUnitOctets, within = 4 * (octet % kUnitOctets);
    uint32_t indices = tile.octets[i];
    if (code_.limit > 7)
      join(chunk + kIndexBytes + within, (lower_bytes(signs) | upper_bytes(signs) << 1) << 2 * unit);
    else
      indices |= lower_bytes(signs) << 3 | upper_bytes(signs) << 7;
    join(chunk + 4 * octet, indices);
    if (code_.limit > kMostNibble)
      join(chunk + layout_.uppers + within, (lower_bytes(tile.tops[i]) | upper_bytes(tile.tops[i]) << 1) << 2 * unit);
    if (code_.gain_count > 8)
      chunk[layout_.digits + octet] = tile.digits[i];
    else
      chunk[layout_.digits + octet / 2] |= static_cast<uint8_t>(tile.digits[i] << 4 * (octet & 1));
  }

  static void join(uint8_t* bytes, uint32_t more) {
    uint32_t word;
    memcpy(&word, bytes, 4);
    word |= more;
    memcpy(bytes, &word, 4);
  }

  const HalfCode& code_;
  const uint8_t* const* planes_;
  const int64_t octets_;
  const HalfLoops& loops_;
  const ChunkLayout layout_;
  uint8_t digits_[256];
};

// Up to eight rows of activations as the loops want them. Integers are round(x / step), half to even.
struct Activations {
  std::vector<float> floats, sums, steps;
  std::vector<int8_t> integers;
  PreparedInputs inputs;

  Activations(const PreparedLoops& loops, const float* x, int64_t columns, int64_t chunks, int rows, int held,
              bool as_integers) {
    const int64_t filled = chunks * kChunkWeights;
    sums.resize(held * chunks * kChunkOctets);
    steps.assign(held, 1.0f);
    if (as_integers)
      integers.resize(held * filled);
    else
      floats.resize(held * filled);
    std::vector<float> row(filled);
    std::vector<int8_t> rounded(as_integers ? filled : 0);
    for (int r = 0; r < rows; ++r) {
      memcpy(row.data(), x + r * columns, columns * sizeof *x);
      if (as_integers) {
        steps[r] = round_to_integers(row, rounded.data());
        loops.arrange_integers(rounded.data(), chunks, integers.data() + r * filled);
      } else {
        loops.arrange_floats(row.data(), chunks, floats.data() + r * filled);
      }
      for (int64_t i = 0; i < chunks * kChunkOctets; ++i)
        sums[r * chunks * kChunkOctets + i] = sum_of_octet(row.data() + 8 * i);
    }
    inputs = {floats.data(), integers.data(), sums.data(), chunks};
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

}  // namespace
}  // namespace compress

// The prepared rows [rows, row bytes] of a payload. Returns the number of rows with a rest that the shape does not have.
COMPRESS_API int64_t compress_half_prepare(const compress::HalfCode* code, const uint8_t* const* planes, int64_t rows,
                                           int64_t columns, uint8_t* out, int instructions, int threads) {
  (void)threads;
  const compress::Preparation preparation(*code, planes, columns, instructions);
  int64_t refused = 0;
#pragma omp parallel for schedule(static) reduction(+ : refused) num_threads(threads)
  for (int64_t r = 0; r < rows; ++r) refused += !preparation.prepare(r, out + r * preparation.row_bytes());
  return refused;
}

// y [rows, out_rows] = x [rows, columns] times the prepared matrix, transposed. Returns 0, or 1 when there is not enough
// memory.
COMPRESS_API int64_t compress_half_prepared_linear(const compress::PreparedCode* code, const uint8_t* prepared,
                                                   int64_t chunks, const float* row_scales, int64_t out_rows,
                                                   int64_t columns, const float* x, int64_t rows, int as_integers,
                                                   float* y, int instructions, int threads) {
  using namespace compress;
  (void)threads;
  const PreparedLoops& loops = loops_of(instructions);
  const auto dot = as_integers ? loops.dot_integers : loops.dot_floats;
  const int64_t row_bytes = chunks * chunk_layout(code->limit, code->gain_count).bytes;
  try {
    for (int64_t done = 0; done < rows; done += kMostRows) {
      const int here = static_cast<int>(rows - done < kMostRows ? rows - done : kMostRows);
      const int held = here <= 2 ? here : here <= 4 ? 4 : kMostRows;
      const Activations activations(loops, x + done * columns, columns, chunks, here, held, as_integers != 0);
#pragma omp parallel for schedule(dynamic, 64) num_threads(threads)
      for (int64_t o = 0; o < out_rows; ++o) {
        float sums[kMostRows];
        dot(*code, prepared + o * row_bytes, activations.inputs, held, sums);
        for (int r = 0; r < here; ++r)
          y[(done + r) * out_rows + o] = sums[r] * row_scales[o] * activations.steps[r];
      }
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
