// Activations x [R, columns] in HALF_TYPE for the products with packed weights: rounded, and in the order they are
// read.
//
// half_inputs_int8: rows of bytes round(x / step), step = max|x| / 127, half to even; [R][tile][4][32 lanes] vectors of
// two octets, a lane's unit having eight. half_inputs: float16 times a power of two that brings max|x| to
// [2^14, 2^15), exact but for numbers 2^-28 times as large; [span][8 octets][R][4 lanes of a quad]. Octets are in the
// order 0 4 1 5 2 6 3 7; beyond the columns there are zeros. `steps` receives what the sums are to be multiplied by,
// NaN for a row that is not finite.
#include "gpu.cuh"

#if !defined(HALF_TYPE)
#define HALF_TYPE 2
#endif

namespace compress {

constexpr int kUnit = 8;  // octets
using In = TypeOf<HALF_TYPE>::Type;

// max|x| of a row over the block; NaN where the row has one.
__device__ __forceinline__ float largest_of_row(const In::Bits* x, int columns) {
  __shared__ float of_warps[kWarp];
  float largest = 0.0f;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) {
    const float here = fabsf(In::number(x[i]));
    largest = here > largest || here != here ? here : largest;
  }
  largest = warp_largest(largest);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = largest;
  __syncthreads();
  return warp_largest(threadIdx.x % kWarp < blockDim.x / kWarp ? of_warps[threadIdx.x % kWarp] : 0.0f);
}

__device__ __forceinline__ bool finite(float number) { return fabsf(number) <= 3.402823466e38f; }

// Column of place k of an octet.
__device__ __forceinline__ int column_of(int k) { return k / 4 * 2 + k % 2 * 4 + k / 2 % 2; }

__device__ __forceinline__ float number_at(const In::Bits* x, int column, int columns) {
  return column < columns ? In::number(x[column]) : 0.0f;
}

}  // namespace compress

// A block a row; `octets`: of a row with those that fill its last tile or span.
extern "C" __global__ void __launch_bounds__(256)
    half_inputs_int8(const compress::In::Bits* x, int columns, int octets, uint2* out, float* steps, float factor) {
  using namespace compress;
  const int r = blockIdx.x;
  x += static_cast<int64_t>(r) * columns;
  const float largest = largest_of_row(x, columns), step = __fdiv_rn(largest, 127.0f);
  if (threadIdx.x == 0) steps[r] = finite(largest) ? step * factor : __int_as_float(0x7fc00000);
  for (int p = threadIdx.x; p < octets; p += blockDim.x) {
    uint32_t words[2] = {};
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const float ratio = __fdiv_rn(number_at(x, 8 * p + column_of(k), columns), step);
      const int whole = ratio == ratio ? min(max(__float2int_rn(ratio), -127), 127) : 0;
      words[k / 4] |= (static_cast<uint32_t>(whole) & 255u) << (8 * (k % 4));
    }
    const int unit = p / kUnit, j = p % kUnit, tile = unit / kWarp, lane = unit % kWarp;
    const int64_t vector =
        (static_cast<int64_t>(r) * (octets / (kUnit * kWarp)) + tile) * (kUnit / 2 * kWarp) + j / 2 * kWarp + lane;
    out[2 * vector + j % 2] = {words[0], words[1]};
  }
}

extern "C" __global__ void __launch_bounds__(256)
    half_inputs(const compress::In::Bits* x, int columns, int octets, uint4* out, float* steps, float factor) {
  using namespace compress;
  const int r = blockIdx.x, rows = gridDim.x;
  x += static_cast<int64_t>(r) * columns;
  const float largest = largest_of_row(x, columns);
  const int exponent = max(static_cast<int>(__float_as_uint(largest) >> 23), 16);  // with its bias of 127
  const float scale = __uint_as_float(static_cast<uint32_t>(127 + 127 + 14 - exponent) << 23);
  const float inverse = __uint_as_float(static_cast<uint32_t>(exponent - 14) << 23);
  if (threadIdx.x == 0) steps[r] = finite(largest) ? inverse * factor : __int_as_float(0x7fc00000);
  for (int p = threadIdx.x; p < octets; p += blockDim.x) {
    uint32_t words[4] = {};
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const float number = number_at(x, 8 * p + column_of(k), columns) * scale;
      words[k / 2] |= static_cast<uint32_t>(Float16::bits(finite(largest) ? number : 0.0f)) << (16 * (k % 2));
    }
    const int unit = p / kUnit, j = p % kUnit, span = unit / 4, t = unit % 4;
    out[((static_cast<int64_t>(span) * kUnit + j) * rows + r) * 4 + t] = {words[0], words[1], words[2], words[3]};
  }
}
