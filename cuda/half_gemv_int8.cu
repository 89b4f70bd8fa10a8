// y [R, rows] = x W^T for HALF_ROWS rows of int8 activations, from packed weights.
//
// A row of W belongs to `parts` warps of a block; a lane takes a unit of 64 weights, a warp a tile of 32 units. The
// next tile's bits are on their way while one is decoded. Blocks stay, so that the tables are copied once each; the
// first tile is read before the copy ends. A group's products are summed exactly in an integer that begins as the bits
// of 1.5 2^23, so that it is its own conversion to a float, then times the gain in float32.
#include "half_source.cuh"

#if !defined(HALF_ROWS)
#define HALF_ROWS 1
#endif
#if !defined(HALF_SHARE_INPUTS)
#define HALF_SHARE_INPUTS 1
#endif
#if !defined(HALF_TYPE)
#define HALF_TYPE 2
#endif

namespace compress {

constexpr int kRows = HALF_ROWS;
constexpr int kThreads = kRows <= 2 ? 1024 : 512, kWarps = kThreads / kWarp;
constexpr uint32_t kMagicBits = 0x4b400000u;
constexpr float kMagic = 12582912.0f;
constexpr int kChunks = kUnit / 2;  // vectors of 16 activations of a unit

// sums[r] += the unit's part of row r. x: [rows][tiles][kChunks][lanes] vectors, at this lane and tile.
__device__ __forceinline__ void add_unit(const Source& source, const Unit& unit, const uint4* x, int stride,
                                         float (&sums)[kRows]) {
  uint4 chunk[kRows];
#pragma unroll
  for (int i = 0; i < kGroupsOfUnit; ++i) {
    uint32_t octet[kOctets], selectors[kOctets];
    const Digit digit = source.digits[source.decode(unit, i, octet, selectors)];
    const float gain = __uint_as_float(digit.gain);
#pragma unroll
    for (int h = 0; h < kOctets; ++h) {
      const int j = i * kOctets + h;
      const OctetBytes bytes = octet_bytes<false>(source.lookups, octet[h], selectors[h], digit.shifts);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (j % 2 == 0) chunk[r] = x[r * stride + j / 2 * kWarp];
        int dot = dot_bytes(bytes.low, j % 2 ? chunk[r].z : chunk[r].x, static_cast<int>(kMagicBits));
        dot = dot_bytes(bytes.high, j % 2 ? chunk[r].w : chunk[r].y, dot);
        sums[r] += gain * (__int_as_float(dot) - kMagic);
      }
    }
  }
}

}  // namespace compress

extern "C" __global__ void __launch_bounds__(compress::kThreads, 1)
    half_gemv_int8(HALF_ARGUMENTS, const float* row_scales, const uint4* x, const float* steps,
                   compress::TypeOf<HALF_TYPE>::Type::Bits* y, int rows, int groups_of_row, int tiles, int parts) {
  using namespace compress;
  extern __shared__ uint4 memory[];
  __shared__ float partial[kWarps][kRows];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int rows_of_block = kWarps / parts, part = warp % parts;
  const int stride = tiles * kChunks * kWarp, jump = gridDim.x * rows_of_block;
  HALF_SOURCE(memory);
#if HALF_SHARE_INPUTS
  start_copy(free_memory, x, kRows * stride);
  const uint4* inputs = free_memory + lane;
#else
  (void)free_memory;
  const uint4* inputs = x + lane;
#endif
  int base = blockIdx.x * rows_of_block, tile = part;
  const int own = warp / parts;
  Unit unit = source.read(min(base + own, rows - 1), groups_of_row, tile * kWarp + lane);
  finish_copies();
  __syncthreads();
  float sums[kRows] = {};
  while (base < rows) {
    const bool last = tile + parts >= tiles;
    const int next_base = last ? base + jump : base, next_tile = last ? part : tile + parts;
    const Unit next = source.read(min(next_base + own, rows - 1), groups_of_row, next_tile * kWarp + lane);
    add_unit(source, unit, inputs + tile * kChunks * kWarp, stride, sums);
    if (last) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        sums[r] = warp_sum(sums[r]);
        if (lane == 0) partial[warp][r] = sums[r];
        sums[r] = 0.0f;
      }
      if (parts > 1)
        __syncthreads();
      else
        __syncwarp();
      if (part == 0 && lane < kRows && base + own < rows) {
        float sum = 0.0f;
        for (int k = 0; k < parts; ++k) sum += partial[warp + k][lane];
        y[static_cast<int64_t>(lane) * rows + base + own] =
            TypeOf<HALF_TYPE>::Type::bits(sum * row_scales[base + own] * steps[lane]);
      }
      if (parts > 1)
        __syncthreads();
      else
        __syncwarp();
    }
    unit = next;
    base = next_base;
    tile = next_tile;
  }
}
