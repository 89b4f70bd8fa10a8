// Products with prepared rows of half-integer pyramids. Rows are spread over threads; an output does not depend
// on their number.
#include "half_prepared.h"

#include <cstring>
#include <new>
#include <vector>

#include "api.h"
#include "instructions.h"

namespace compress {
namespace {

constexpr int kMostRows = 8;  // rows of activations that share the work of decoding
constexpr int kBlock = 64;    // prepared rows that a thread takes at once
constexpr int kChunkWeights = 8 * kChunkOctets;

const PreparedLoops& loops_of(int instructions) {
#if defined(COMPRESS_WITH_AVX)
  if (instructions == kAvx512 && __builtin_cpu_supports("avx512vnni")) return *prepared_loops_avx512();
  if (instructions >= kAvx2) return *prepared_loops_avx2();
#endif
  (void)instructions;
  return *prepared_loops_base();
}

struct alignas(64) Line {
  char bytes[64];
};

// At the beginning of a line of the cache, where a load of 32 bytes never takes two. Zeros at first.
template <class Element>
class Aligned {
 public:
  Aligned() = default;
  explicit Aligned(int64_t size) : lines_((size * sizeof(Element) + sizeof(Line) - 1) / sizeof(Line)) {}
  Element* data() { return reinterpret_cast<Element*>(lines_.data()); }

 private:
  std::vector<Line> lines_;
};

// Up to eight rows of activations as the loops want them. Integers are round(x / step), half to even.
struct Activations {
  Aligned<float> floats, sums;
  Aligned<int8_t> integers;
  float steps[kMostRows];
  PreparedInputs inputs;

  Activations(const PreparedLoops& loops, const float* x, int64_t columns, int64_t chunks, int rows, int held,
              bool as_integers)
      : floats(as_integers ? 0 : held * chunks * kChunkWeights),
        sums(held * chunks * kChunkOctets),
        integers(as_integers ? held * chunks * kChunkWeights : 0) {
    const int64_t filled = chunks * kChunkWeights, octets = chunks * kChunkOctets;
    std::vector<float> row(filled);
    std::vector<int8_t> rounded(as_integers ? filled : 0);
    for (int r = 0; r < rows; ++r) {
      memcpy(row.data(), x + r * columns, columns * sizeof *x);
      if (as_integers) {
        steps[r] = round_to_integers(row, rounded.data());
        loops.arrange_integers(rounded.data(), chunks, integers.data() + r * filled);
      } else {
        steps[r] = 1.0f;
        loops.arrange_floats(row.data(), chunks, floats.data() + r * filled);
      }
      for (int64_t i = 0; i < octets; ++i) sums.data()[r * octets + i] = sum_of_octet(row.data() + 8 * i);
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
    constexpr int kLanes = 16;
    float largest[kLanes] = {}, spoilt[kLanes] = {};
    for (size_t i = 0; i < x.size(); i += kLanes)
      for (int j = 0; j < kLanes; ++j) {
        const float v = x[i + j], magnitude = v < 0.0f ? -v : v;
        largest[j] = magnitude > largest[j] ? magnitude : largest[j];
        spoilt[j] += v * 0.0f;
      }
    for (int j = 1; j < kLanes; ++j) {
      largest[0] = largest[j] > largest[0] ? largest[j] : largest[0];
      spoilt[0] += spoilt[j];
    }
    const float step = largest[0] / 127.0f, divisor = step > 0.0f ? step : 1.0f;
    for (size_t i = 0; i < x.size(); ++i) {
      float q = x[i] / divisor;
      q = q < 127.0f ? q : 127.0f;  // a step without all its bits
      q = q > -127.0f ? q : -127.0f;
      x[i] = (q + kWhole) - kWhole;
      out[i] = static_cast<int8_t>(x[i]);
    }
    return step + spoilt[0];
  }
};

}  // namespace
}  // namespace compress

// y [rows, out_rows] = x [rows, columns] times the prepared matrix, transposed. Returns 0, or 1 when there is not
// enough memory.
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
      const int64_t blocks = (out_rows + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
      for (int64_t b = 0; b < blocks; ++b) {
        float sums[kBlock * kMostRows];
        const int64_t first = b * kBlock;
        const int count = static_cast<int>(out_rows - first < kBlock ? out_rows - first : kBlock);
        dot(*code, prepared + first * row_bytes, count, activations.inputs, held, sums);
        for (int o = 0; o < count; ++o)
          for (int r = 0; r < here; ++r)
            y[(done + r) * out_rows + first + o] = sums[o * held + r] * row_scales[first + o] * activations.steps[r];
      }
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
