// W [rows, columns] in HALF_TYPE (0 float32, 1 float16, 2 bfloat16) of a packed matrix: one group a thread.
#include "half_source.cuh"

#if !defined(HALF_TYPE)
#define HALF_TYPE 2
#endif

namespace compress {

using Out = TypeOf<HALF_TYPE>::Type;

// Byte of weight j in the order of octet_bytes.
__device__ __forceinline__ float weight_of(const OctetBytes& bytes, int j) {
  return static_cast<float>(byte_of(j & 2 ? bytes.high : bytes.low, (j & 1) * 2 + j / 4));
}

// Eight numbers to `out`, which is aligned to 8 of them where `whole` says so; `count` of them lie in the row.
__device__ __forceinline__ void write_octet(const float (&w)[8], bool whole, int count, Out::Bits* out) {
  alignas(16) Out::Bits bits[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) bits[j] = Out::bits(w[j]);
  if (whole) {
    constexpr int vectors = sizeof(bits) / sizeof(uint4);
#pragma unroll
    for (int k = 0; k < vectors; ++k)
      __stcs(reinterpret_cast<uint4*>(out) + k, reinterpret_cast<const uint4*>(bits)[k]);
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (j < count) out[j] = bits[j];
  }
}

}  // namespace compress

extern "C" __global__ void __launch_bounds__(512)
    half_decode(HALF_ARGUMENTS, const float* row_scales, compress::Out::Bits* out, int64_t groups, int groups_of_row,
                int columns) {
  using namespace compress;
  extern __shared__ uint4 memory[];
  HALF_SOURCE(memory);
  (void)free_memory;
  finish_copies();
  __syncthreads();
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t group = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; group < groups; group += step) {
    const int64_t row =
        groups >> 31 ? group / groups_of_row : static_cast<uint32_t>(group) / static_cast<uint32_t>(groups_of_row);
    const int place = static_cast<int>(group - row * groups_of_row) * kDim;
    uint32_t octet[kOctets], selectors[kOctets];
    const Digit digit = source.digits[source.decode_group(group, octet, selectors)];
    const float c = __fmul_rn(row_scales[row], __uint_as_float(digit.gain));
#pragma unroll
    for (int h = 0; h < kOctets; ++h) {
      const OctetBytes bytes = octet_bytes<false>(source.lookups, octet[h], selectors[h], digit.shifts);
      float w[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) w[j] = __fmul_rn(c, weight_of(bytes, j));
      const int column = place + 8 * h;
      write_octet(w, columns % 8 == 0 && column < columns, columns - column, out + row * columns + column);
    }
  }
}
