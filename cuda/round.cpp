// Calibrated rounding of groups on the processor: the threads, the instruction set.
#include "round.h"

#include <vector>

#include "api.h"
#include "instructions.h"
#include "search_tables.h"

namespace compress {
namespace {

constexpr int64_t kRows = 64;  // that a thread takes at once, a multiple of every number of lanes

RoundRows round_rows_of(int instructions) {
#if defined(COMPRESS_WITH_AVX)
  if (instructions == kAvx512) return round_rows_avx512();
  if (instructions == kAvx2) return round_rows_avx2();
#endif
  (void)instructions;
  return round_rows_base();
}

}  // namespace
}  // namespace compress

// Rounds a span of columns of all rows; see round.h and compress/codecs/group_rounding.py, which defines it.
COMPRESS_API int64_t compress_round_span(const float* base, const float* carried, const float* scale,
                                         const float* inverses, const float* metrics, const float* coupling,
                                         const int64_t* places, int64_t rows, int64_t columns, int64_t groups,
                                         const float* gain_values, const int8_t* levels, int dim, int gain_count,
                                         int level_count, int shift, int pulses, int least, int most, double overstep,
                                         int steps, int keep, int8_t* values, int64_t* gain, int64_t* coset,
                                         float* gains, float* decoded, int instructions, int threads) {
  using namespace compress;
  const SearchTables tables(gain_values, gain_count, levels, level_count, dim, shift, pulses, least, most);
  std::vector<int8_t> first(dim);
  first_group(levels, level_count - 1, dim, pulses, shift, first.data());
  const RoundSpan span = {&tables.search, encode_groups_of(instructions),
                          base,           carried,
                          scale,          inverses,
                          metrics,        coupling,
                          places,         gain_values,
                          first.data(),   columns,
                          groups,         dim,
                          static_cast<float>(overstep), steps,
                          keep != 0,      values,
                          gain,           coset,
                          gains,          decoded};
  const RoundRows round_rows = round_rows_of(instructions);
  const int64_t tiles = (rows + kRows - 1) / kRows;
  (void)threads;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t from = tile * kRows;
    round_rows(span, from, rows - from < kRows ? rows - from : kRows);
  }
  return 0;
}
