// The encoder of all pyramids on the processor: the threads, the instruction set.
#include "encode.h"

#include "api.h"
#include "instructions.h"
#include "search_tables.h"

namespace compress {

EncodeGroups encode_groups_of(int instructions) {
#if defined(COMPRESS_WITH_AVX)
  if (instructions == kAvx512) return encode_groups_avx512();
  if (instructions == kAvx2) return encode_groups_avx2();
#endif
  (void)instructions;
  return encode_groups_base();
}

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
  constexpr int64_t kBlock = 4096;  // groups that a thread takes at once, a multiple of every number of lanes
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
