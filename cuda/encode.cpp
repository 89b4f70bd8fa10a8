// The encoder of all pyramids on the processor: what a search needs, the threads, the instruction set.
#include "encode.h"

#include <cstring>
#include <vector>

#include "api.h"
#include "encode.cuh"
#include "instructions.h"

namespace compress {
namespace {

constexpr int64_t kBlock = 4096;  // groups that a thread takes at once, a multiple of every number of lanes

EncodeGroups encode_groups_of(int instructions) {
#if defined(COMPRESS_WITH_AVX)
  if (instructions == kAvx512) return encode_groups_avx512();
  if (instructions == kAvx2) return encode_groups_avx2();
#endif
  (void)instructions;
  return encode_groups_base();
}

// A search and the tables it points to.
struct SearchTables {
  Search search;
  std::vector<float> inverse;
  float level[kLevels] = {}, rise[kLevels] = {}, cost[kLevels] = {};

  SearchTables(const float* gains, int gain_count, const int8_t* levels, int level_count, int dim, int shift,
               int pulses, int least, int most)
      : inverse(gain_count) {
    for (int j = 0; j < gain_count; ++j) inverse[j] = 1.0f / gains[j];
    const int limit = level_count - 1, anchor = limit < 4 ? limit : 4;
    const float pitch = limit > 0 ? static_cast<float>(levels[anchor] - levels[0]) / static_cast<float>(anchor) : 1.0f;
    bool uniform = true;
    for (int m = 1; m < limit; ++m) uniform &= levels[m + 1] - levels[m] == levels[1] - levels[0];
    if (level_count <= kLevels) {
      for (int m = 0; m < level_count; ++m) level[m] = levels[m];
      for (int m = 0; m < limit; ++m) {
        rise[m] = 2.0f * (level[m + 1] - level[m]);
        cost[m] = level[m + 1] * level[m + 1] - level[m] * level[m];
      }
    }
    search = {dim,
              pulses,
              limit,
              gain_count,
              static_cast<float>(shift),
              1.0f / pitch,
              static_cast<float>(levels[0]) / pitch,
              static_cast<float>(least),
              static_cast<float>(most),
              gains,
              inverse.data(),
              !uniform,
              pitch,
              static_cast<float>(levels[0]),
              level,
              rise,
              cost};
  }
};

// The codebook's first group: the last coordinates carry as much as they may.
void first_group(const int8_t* levels, int limit, int dim, int pulses, int shift, int8_t* values) {
  for (int i = dim - 1; i >= 0; --i) {
    const int here = pulses < limit ? pulses : limit;
    values[i] = static_cast<int8_t>(levels[here] + shift);
    pulses -= here;
  }
}

}  // namespace
}  // namespace compress

// min over gain, coset and m of ||x - scale gain (s t[m] + e shift)||^2 for each group; see encode.cuh. Levels that are
// not uniform must be at most 16; sum t[m_i] is in [least, most]. A scale of 0 gives the codebook's first group.
COMPRESS_API int64_t compress_encode(const float* x, const float* scale, const float* gains, const int8_t* levels,
                                     int64_t groups, int dim, int gain_count, int level_count, int shift, int pulses,
                                     int least, int most, int8_t* values, int64_t* gain, int64_t* coset,
                                     int instructions, int threads) {
  using namespace compress;
  const SearchTables tables(gains, gain_count, levels, level_count, dim, shift, pulses, least, most);
  const EncodeGroups encode = encode_groups_of(instructions);
  const int64_t blocks = (groups + kBlock - 1) / kBlock;
  (void)threads;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = b * kBlock, count = groups - first < kBlock ? groups - first : kBlock;
    int8_t* out = values + first * dim;
    encode(tables.search, x + first * dim, scale + first, count, out, gain + first, coset + first);
    for (int64_t g = 0; g < count; ++g) {
      if (scale[first + g] > 0.0f) continue;
      first_group(levels, level_count - 1, dim, pulses, shift, out + g * dim);
      gain[first + g] = coset[first + g] = 0;
    }
  }
  return 0;
}
