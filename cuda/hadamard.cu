// Every row of x [rows, HADAMARD_COLUMNS] times H / sqrt(n), n = 2^k up to 32768, in HALF_TYPE, in place or not.
//
// Element i = (e W + w) 32 + lane of a row lies in register e of thread (w, lane). The bits of e are done in registers.
// With one warp a row those of the lane follow by shuffles; with more, the row goes through shared memory, where a
// thread takes the 32 elements of some (e, w), and then the W elements of some (e, lane). Runs of 32 are padded by one,
// so that no access finds two lanes in one bank.
#include "gpu.cuh"

#if !defined(HADAMARD_COLUMNS)
#define HADAMARD_COLUMNS 4096
#endif
#if !defined(HALF_TYPE)
#define HALF_TYPE 2
#endif

namespace compress {

using T = TypeOf<HALF_TYPE>::Type;
constexpr int kColumns = HADAMARD_COLUMNS;
constexpr int kHeld = kColumns <= 32 ? 1 : kColumns <= 1024 ? kColumns / 32 : 32;
constexpr int kWarps = kColumns / (32 * kHeld) > 1 ? kColumns / (32 * kHeld) : 1;
constexpr int kSets = kHeld / kWarps > 0 ? kHeld / kWarps : 1;  // of W elements, of a thread
constexpr int kPitch = 33;
constexpr int kLanes = kColumns < 32 ? kColumns : 32;

// The transform of kCount numbers, without its scale.
template <int kCount>
__device__ __forceinline__ void transform(float* values) {
#pragma unroll
  for (int distance = 1; distance < kCount; distance *= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i & distance) continue;
      const float a = values[i], b = values[i + distance];
      values[i] = a + b;
      values[i + distance] = a - b;
    }
  }
}

// Over the lanes, eight registers at a time: with all of them at once the results of shuffles would not find room.
__device__ __forceinline__ void transform_lanes(float* values, int lane) {
  constexpr int together = kHeld < 8 ? kHeld : 8;
#pragma unroll
  for (int first = 0; first < kHeld; first += together) {
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) {
      const float sign = lane & distance ? -1.0f : 1.0f;
#pragma unroll
      for (int e = first; e < first + together; ++e) {
        const float other = __shfl_xor_sync(~0u, values[e], distance);
        values[e] = sign * values[e] + other;
      }
    }
  }
}

template <int kCount>
__device__ __forceinline__ void write(const float* values, float scale, int lane, T::Bits* y) {
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (kLanes == 32 || lane < kLanes) y[i * 32 + lane] = T::bits(values[i] * scale);
}

}  // namespace compress

extern "C" __global__ void __launch_bounds__(32 * compress::kWarps, 1)
    hadamard(const compress::T::Bits* x, compress::T::Bits* y, float scale) {
  using namespace compress;
  extern __shared__ float row[];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  x += static_cast<int64_t>(blockIdx.x) * kColumns;
  y += static_cast<int64_t>(blockIdx.x) * kColumns;
  float values[kHeld];
#pragma unroll
  for (int e = 0; e < kHeld; ++e)
    values[e] = kLanes == 32 || lane < kLanes ? T::number(x[(e * kWarps + warp) * 32 + lane]) : 0.0f;
  transform<kHeld>(values);
  if constexpr (kWarps == 1) {
    transform_lanes(values, lane);
    write<kHeld>(values, scale, lane, y);
  } else {
#pragma unroll
    for (int e = 0; e < kHeld; ++e) row[(e * kWarps + warp) * kPitch + lane] = values[e];
    __syncthreads();
    float* run = row + threadIdx.x * kPitch;
#pragma unroll
    for (int i = 0; i < 32; ++i) values[i] = run[i];
    transform<32>(values);
#pragma unroll
    for (int i = 0; i < 32; ++i) run[i] = values[i];
    __syncthreads();
#pragma unroll 1
    for (int e = warp * kSets; e < (warp + 1) * kSets; ++e) {
      float across[kWarps];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) across[w] = row[(e * kWarps + w) * kPitch + lane];
      transform<kWarps>(across);
      write<kWarps>(across, scale, lane, y + e * kWarps * 32);
    }
  }
}
