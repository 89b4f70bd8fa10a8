// The exact encoder (encode.cuh), one group of HALF_DIM weights a thread. Compile with -fmad=false: codes must be those
// of every other backend.
#include "encode.cuh"

#include "half_shape.cuh"

namespace compress {

constexpr int kThreads = 128;

#if HALF_LIMIT > 7
constexpr int kEntries = 16;
#else
constexpr int kEntries = 8;
#endif
#if !defined(HALF_UNIFORM)
#define HALF_UNIFORM 0
#endif
#if HALF_UNIFORM
using Levels = UniformLevels<OneLane>;
#else
using Levels = TableLevels<OneLane, kEntries>;
#endif

}  // namespace compress

// tables: gains, their inverses, and 16 each of levels, c1 and c0. first: the group that a scale of 0 gives.
extern "C" __global__ void __launch_bounds__(compress::kThreads)
    half_encode(const float* x, const float* scale, const float* tables, const int8_t* first, float slope, float offset,
                float least, float most, float step, float start, int64_t groups, int8_t* values, int64_t* gain,
                int64_t* coset) {
  using namespace compress;
  constexpr int count = 2 * HALF_GAINS + 3 * kLevels;
  __shared__ float shared[count];
  for (int i = threadIdx.x; i < count; i += kThreads) shared[i] = tables[i];
  __syncthreads();
  const int64_t g = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (g >= groups) return;
  const float* levels = shared + 2 * HALF_GAINS;
  const Search search = {HALF_DIM,
                         HALF_PULSES,
                         HALF_LIMIT,
                         HALF_GAINS,
                         static_cast<float>(HALF_SHIFT),
                         slope,
                         offset,
                         least,
                         most,
                         shared,
                         shared + HALF_GAINS,
                         HALF_UNIFORM == 0,
                         step,
                         start,
                         levels,
                         levels + kLevels,
                         levels + 2 * kLevels};
  float group[HALF_DIM], found[HALF_DIM], best_gain, best_coset;
#pragma unroll
  for (int i = 0; i < HALF_DIM; ++i) group[i] = x[g * HALF_DIM + i];
  const bool empty = scale[g] == 0.0f;
  encode_lanes<OneLane, HALF_DIM>(search, Levels(search), group, empty ? 1.0f : scale[g], found, best_gain, best_coset);
  gain[g] = empty ? 0 : static_cast<int64_t>(best_gain);
  coset[g] = empty ? 0 : static_cast<int64_t>(best_coset);
#pragma unroll
  for (int i = 0; i < HALF_DIM; ++i) values[g * HALF_DIM + i] = empty ? first[i] : static_cast<int8_t>(found[i]);
}
