// y [R, rows] = x W^T for up to eight rows of 16-bit activations, from packed weights, on tensor cores.
//
// The activations are float16, scaled by a power of two so that a bfloat16 fits (half_inputs.cu), the weights g v
// rounded to float16; sums are float32. Up to eight levels are looked up as float16, low and high bytes apart, and
// become g v in one fused multiply-add with g and g e d; more of them go through bytes 128 + v, exactly, and a product.
// One multiply-add of 16 x 16 by 16 x 8 serves any R at the same cost, since decoding is what takes the time. The 16
// columns that it sums over are four of each of the four lanes of a quad, in whatever order; so a lane decodes whole
// groups of row g and of row g + 8 and hands over its own weights. A block takes 16 rows of W, its warps share the
// columns.
#include "half_shape.cuh"

#define HALF_PAIRS (HALF_LIMIT <= 7)
#include "half_source.cuh"

#if !defined(HALF_SHARE_INPUTS)
#define HALF_SHARE_INPUTS 1
#endif
#if !defined(HALF_TYPE)
#define HALF_TYPE 2
#endif

namespace compress {

constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr int kTile = 16, kMostRows = 8, kQuad = 4;
constexpr uint32_t kThousands = 0x64646464u;  // byte b behind 0x64 is the float16 1024 + b
constexpr uint32_t kZeroPair = 0x64806480u;   // 1024 + 128

// Two weights of bytes 128 + v.
__device__ __forceinline__ uint32_t weight_pair(uint32_t bytes, uint32_t selector, uint32_t gains) {
  return multiply_pairs(subtract_pairs(permute_bytes(bytes, kThousands, selector), kZeroPair), gains);
}

// Four weights of the levels' float16.
__device__ __forceinline__ void look_up_pairs(const Lookups& from, uint32_t nibbles, uint32_t mask, Digit digit,
                                              uint32_t* pairs) {
  const uint32_t low = permute_bytes(from.low_halves[0], from.low_halves[1], nibbles);
  const uint32_t high = permute_bytes(from.high_halves[0], from.high_halves[1], nibbles) ^ (mask & kBias);
  pairs[0] = fuse_pairs(permute_bytes(low, high, 0x5140), digit.gain, digit.shifts);
  pairs[1] = fuse_pairs(permute_bytes(low, high, 0x7362), digit.gain, digit.shifts);
}

// Weights 0 4, 1 5, 2 6, 3 7.
__device__ __forceinline__ void weight_pairs(const Lookups& from, uint32_t octet, uint32_t selector, Digit digit,
                                             uint32_t (&pairs)[4]) {
#if HALF_LIMIT > 7
  const OctetBytes bytes = octet_bytes<true>(from, octet, selector, digit.shifts);
  pairs[0] = weight_pair(bytes.low, 0x4140, digit.gain);
  pairs[1] = weight_pair(bytes.low, 0x4342, digit.gain);
  pairs[2] = weight_pair(bytes.high, 0x4140, digit.gain);
  pairs[3] = weight_pair(bytes.high, 0x4342, digit.gain);
#else
  const OctetBytes masks = sign_masks(from, selector);
  look_up_pairs(from, octet, masks.low, digit, pairs);
  look_up_pairs(from, octet >> 16, masks.high, digit, pairs + 2);
#endif
}

// x: [8 octets][R][4 lanes of the quad] vectors, at this lane's row and place; `silent` where there is no such row.
__device__ __forceinline__ void add_units(const Source& source, const Unit& upper, const Unit& lower, const uint4* x,
                                          int stride, bool silent, float (&c)[4]) {
#pragma unroll
  for (int i = 0; i < kGroupsOfUnit; ++i) {
    uint32_t octets[2][kOctets], selectors[2][kOctets];
    const Digit first = source.digits[source.decode(upper, i, octets[0], selectors[0])];
    const Digit second = source.digits[source.decode(lower, i, octets[1], selectors[1])];
#pragma unroll
    for (int h = 0; h < kOctets; ++h) {
      const uint4 inputs = silent ? uint4{} : x[(i * kOctets + h) * stride];
      uint32_t above[4], below[4];
      weight_pairs(source.lookups, octets[0][h], selectors[0][h], first, above);
      weight_pairs(source.lookups, octets[1][h], selectors[1][h], second, below);
      multiply_add<Float16>({above[0], below[0], above[1], below[1]}, inputs.x, inputs.y, c);
      multiply_add<Float16>({above[2], below[2], above[3], below[3]}, inputs.z, inputs.w, c);
    }
  }
}

}  // namespace compress

// gains: pairs of float16. steps: by which the sums of a row of x are multiplied, with the gains' power of two.
extern "C" __global__ void __launch_bounds__(compress::kThreads, 1)
    half_gemv(HALF_ARGUMENTS, const float* row_scales, const uint4* x, const float* steps,
              compress::TypeOf<HALF_TYPE>::Type::Bits* y, int rows, int groups_of_row, int spans, int inputs) {
  using namespace compress;
  extern __shared__ uint4 memory[];
  __shared__ float partial[kWarps][kTile * kMostRows];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / kQuad, t = lane % kQuad;
  const int stride = inputs * kQuad;
  HALF_SOURCE(memory);
#if HALF_SHARE_INPUTS
  start_copy(free_memory, x, spans * kUnit * stride);
  const uint4* mine = free_memory + g * kQuad + t;
#else
  (void)free_memory;
  const uint4* mine = x + g * kQuad + t;
#endif
  int base = blockIdx.x * kTile, span = warp;
  Unit upper = source.read(min(base + g, rows - 1), groups_of_row, span * kQuad + t);
  Unit lower = source.read(min(base + g + 8, rows - 1), groups_of_row, span * kQuad + t);
  finish_copies();
  __syncthreads();
  float c[4] = {};
  while (base < rows) {
    const bool last = span + kWarps >= spans;
    const int next_base = last ? base + gridDim.x * kTile : base, next_span = last ? warp : span + kWarps;
    const Unit next_upper = source.read(min(next_base + g, rows - 1), groups_of_row, next_span * kQuad + t);
    const Unit next_lower = source.read(min(next_base + g + 8, rows - 1), groups_of_row, next_span * kQuad + t);
    if (span < spans) add_units(source, upper, lower, mine + span * kUnit * stride, stride, g >= inputs, c);
    if (last) {
      float* own = partial[warp];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        own[(g + k / 2 * 8) * kMostRows + 2 * t + k % 2] = c[k];
        c[k] = 0.0f;
      }
      __syncthreads();
      for (int i = threadIdx.x; i < kTile * kMostRows; i += kThreads) {
        const int row = base + i / kMostRows, r = i % kMostRows;
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < kWarps; ++k) sum += partial[k][i];
        if (row < rows && r < inputs)
          y[static_cast<int64_t>(r) * rows + row] = TypeOf<HALF_TYPE>::Type::bits(sum * row_scales[row] * steps[r]);
      }
      __syncthreads();
    }
    upper = next_upper;
    lower = next_lower;
    base = next_base;
    span = next_span;
  }
}
