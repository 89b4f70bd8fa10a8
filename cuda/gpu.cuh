// What only a GPU has: shuffles, copies to shared memory, half-precision numbers as bits, and tensor cores. Written as
// PTX, so that a kernel needs no header of a CUDA toolkit when NVRTC compiles it where it runs.
#pragma once

#include <cstdint>

namespace compress {

constexpr int kWarp = 32;

// The types that activations and weights can have: their bits, and their numbers.
struct Float32 {
  using Bits = float;
  static __device__ __forceinline__ float number(float bits) { return bits; }
  static __device__ __forceinline__ float bits(float number) { return number; }
};

struct Float16 {
  using Bits = uint16_t;
  static __device__ __forceinline__ float number(uint16_t bits) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(bits));
    return result;
  }
  static __device__ __forceinline__ uint16_t bits(float number) {
    uint16_t result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(number));
    return result;
  }
};

struct BFloat16 {
  using Bits = uint16_t;
  static __device__ __forceinline__ float number(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  }
  static __device__ __forceinline__ uint16_t bits(float number) {
    uint16_t result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(number));
    return result;
  }
};

template <int kType>
struct TypeOf;
template <>
struct TypeOf<0> {
  using Type = Float32;
};
template <>
struct TypeOf<1> {
  using Type = Float16;
};
template <>
struct TypeOf<2> {
  using Type = BFloat16;
};

// Pairs of float16 in a word.
__device__ __forceinline__ uint32_t subtract_pairs(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("mul.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}
__device__ __forceinline__ uint32_t fuse_pairs(uint32_t a, uint32_t b, uint32_t c) {  // a b + c, rounded once
  uint32_t result;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

__device__ __forceinline__ float warp_largest(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(~0u, value, distance);
    value = other > value || other != other ? other : value;  // what is no number stays
  }
  return value;
}

// The block copies `count` vectors of 16 bytes to shared memory, past the registers; `finish_copies` and a barrier end
// it.
__device__ __forceinline__ void start_copy(uint4* to, const uint4* from, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to + i));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from + i) : "memory");
  }
}
__device__ __forceinline__ void finish_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// c [16, 8] += a [16, 16] b [16, 8]. Lane (g, t) = (lane / 4, lane % 4) holds of a: rows g and g + 8 at columns 2t and
// 2t + 1, then both at 2t + 8 and 2t + 9; of b: rows 2t, 2t + 1 and 2t + 8, 2t + 9 of column g; of c: columns 2t, 2t +
// 1 of row g, then of row g + 8.
template <class T>
__device__ __forceinline__ void multiply_add(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (&c)[4]);

template <>
__device__ __forceinline__ void multiply_add<Float16>(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply_add<BFloat16>(const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                                       float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace compress
