// y [R, rows] = x W^T for many rows of 16-bit activations (HALF_TYPE 1 float16, 2 bfloat16), from packed weights.
//
// A block computes tiles of 128 rows of W by 128 rows of x. It decodes 128 x 64 weights at a time, as gain times v in
// the type of x, into one of two buffers in shared memory while tensor cores work on the other; W is never in memory as
// a whole. The rows' scales are applied to the float32 sums. Rows of a buffer are padded by 16 bytes, so that the eight
// rows that a warp reads at once lie in different banks.
#include "half_source.cuh"

#if !defined(HALF_TYPE)
#define HALF_TYPE 2
#endif

namespace compress {

using T = TypeOf<HALF_TYPE>::Type;
constexpr int kThreads = 256, kRowsOfTile = 128, kDepth = 64, kPitch = kDepth + 8;  // in numbers of 16 bits
constexpr int kTilePitch = kPitch / 2;                                              // in words
constexpr int kOctetsOfThread = kRowsOfTile * kDepth / 8 / kThreads, kThreadsOfRow = kThreads / kRowsOfTile;

struct Buffer {
  uint32_t w[kRowsOfTile * kTilePitch], x[kRowsOfTile * kTilePitch];
};

__device__ __forceinline__ uint32_t pair_of(const OctetBytes& bytes, int j, float gain) {
  const uint32_t word = j & 2 ? bytes.high : bytes.low;  // of weights j and j + 1, j even: bytes j / 4 and 2 + j / 4
  const float first = gain * static_cast<float>(byte_of(word, j / 4));
  const float second = gain * static_cast<float>(byte_of(word, 2 + j / 4));
  return T::bits(first) | static_cast<uint32_t>(T::bits(second)) << 16;
}

// Weights [row, octet ..] of the buffer from the groups of row `row` of W; zeros beyond it.
__device__ __forceinline__ void fill_weights(const Source& source, int row, int rows, int groups_of_row, int octet,
                                             uint4* out) {
#pragma unroll
  for (int i = 0; i < kOctetsOfThread / kOctets; ++i) {
    const int place = octet / kOctets + i;
    uint32_t octets[kOctets] = {}, selectors[kOctets] = {};
    Digit digit = source.digits[kDigits];
    if (row < rows && place < groups_of_row)
      digit = source.digits[source.decode_group(static_cast<int64_t>(row) * groups_of_row + place, octets, selectors)];
#pragma unroll
    for (int h = 0; h < kOctets; ++h) {
      const OctetBytes bytes = octet_bytes<false>(source.lookups, octets[h], selectors[h], digit.shifts);
      const float gain = __uint_as_float(digit.gain);
      out[i * kOctets + h] = {pair_of(bytes, 0, gain), pair_of(bytes, 2, gain), pair_of(bytes, 4, gain),
                              pair_of(bytes, 6, gain)};
    }
  }
}

__device__ __forceinline__ void fill(const Source& source, int base, int rows, int groups_of_row, const uint4* x,
                                     int first, int inputs, int vectors_of_x, int chunk, Buffer& buffer) {
  const int own = threadIdx.x / kThreadsOfRow, octet = threadIdx.x % kThreadsOfRow * kOctetsOfThread;
  uint4 in[kOctetsOfThread];
#pragma unroll
  for (int i = 0; i < kOctetsOfThread; ++i) {
    const int vector = chunk * kUnit + octet + i;
    const bool there = first + own < inputs && vector < vectors_of_x;
    in[i] = there ? x[static_cast<int64_t>(first + own) * vectors_of_x + vector] : uint4{};
  }
  fill_weights(source, base + own, rows, groups_of_row, chunk * kUnit + octet,
               reinterpret_cast<uint4*>(buffer.w + own * kTilePitch) + octet);
#pragma unroll
  for (int i = 0; i < kOctetsOfThread; ++i) reinterpret_cast<uint4*>(buffer.x + own * kTilePitch)[octet + i] = in[i];
}

// Warps lie 4 x 2 over the tile, 32 rows of W by 64 of x each.
__device__ __forceinline__ void multiply(const Buffer& buffer, int row, int column, int g, int t, float (&c)[2][8][4]) {
#pragma unroll
  for (int k = 0; k < kDepth / 2; k += 8) {
    uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t* w = buffer.w + (row + 16 * i + g) * kTilePitch + k + t;
      a[i][0] = w[0], a[i][1] = w[8 * kTilePitch], a[i][2] = w[4], a[i][3] = w[8 * kTilePitch + 4];
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint32_t* x = buffer.x + (column + 8 * j + g) * kTilePitch + k + t;
      const uint32_t b0 = x[0], b1 = x[4];
      multiply_add<T>(a[0], b0, b1, c[0][j]);
      multiply_add<T>(a[1], b0, b1, c[1][j]);
    }
  }
}

}  // namespace compress

// vectors_of_x: x has 8 vectors_of_x columns. factor: what the gains were divided by.
extern "C" __global__ void __launch_bounds__(compress::kThreads, 1)
    half_gemm(HALF_ARGUMENTS, const float* row_scales, const uint4* x, compress::T::Bits* y, int rows,
              int groups_of_row, int inputs, int vectors_of_x, float factor) {
  using namespace compress;
  extern __shared__ uint4 memory[];
  HALF_SOURCE(memory);
  Buffer* buffers = reinterpret_cast<Buffer*>(free_memory);
  finish_copies();
  __syncthreads();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int row = warp / 2 * 32, column = warp % 2 * 64, chunks = (vectors_of_x + kUnit - 1) / kUnit;
  const int down = (rows + kRowsOfTile - 1) / kRowsOfTile, across = (inputs + kRowsOfTile - 1) / kRowsOfTile;
  for (int tile = blockIdx.x; tile < down * across; tile += gridDim.x) {
    const int base = tile % down * kRowsOfTile, first = tile / down * kRowsOfTile;
    float c[2][8][4] = {};
    fill(source, base, rows, groups_of_row, x, first, inputs, vectors_of_x, 0, buffers[0]);
    __syncthreads();
    for (int chunk = 0; chunk < chunks; ++chunk) {
      if (chunk + 1 < chunks)
        fill(source, base, rows, groups_of_row, x, first, inputs, vectors_of_x, chunk + 1, buffers[(chunk + 1) % 2]);
      multiply(buffers[chunk % 2], row, column, g, t, c);
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int out = base + row + 16 * i + g + k / 2 * 8, in = first + column + 8 * j + 2 * t + k % 2;
          if (out < rows && in < inputs)
            y[static_cast<int64_t>(in) * rows + out] = T::bits(c[i][j][k] * row_scales[out] * factor);
        }
      }
    }
  }
}
