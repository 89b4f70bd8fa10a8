// Lanes for the processor: vectors of the compiler, so that one source serves SSE, AVX2, AVX-512 and ARM. How many
// there are in a vector is what the instruction set has; the results do not depend on it.
#pragma once

#include "encode.cuh"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace compress {
namespace {

#if defined(__GNUC__)

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

struct Lanes {
  typedef float F __attribute__((vector_size(4 * kLanes)));
  typedef int32_t I __attribute__((vector_size(4 * kLanes)));
  using M = I;
  static constexpr int kCount = kLanes;

  static COMPRESS_HD bool any(M mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
    int32_t found = 0;
    for (int i = 0; i < kLanes; ++i) found |= mask[i];
    return found != 0;
#endif
  }

  static COMPRESS_HD M without(M mask, M other) { return mask & ~other; }
  static COMPRESS_HD F select(M mask, F a, F b) { return mask ? a : b; }
  static COMPRESS_HD F larger(F a, F b) {
#if defined(__AVX512F__)
    return (F)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (F)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
  }

  static COMPRESS_HD F smaller(F a, F b) {
#if defined(__AVX512F__)
    return (F)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (F)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
  }

  static COMPRESS_HD F truncate(F a) { return __builtin_convertvector(__builtin_convertvector(a, I), F); }
  static COMPRESS_HD F all(float a) { return a - F{}; }

  static COMPRESS_HD F gather(const float* table, F index) {
    const I place = __builtin_convertvector(index, I);
    F found;
    for (int i = 0; i < kLanes; ++i) found[i] = table[place[i]];
    return found;
  }

  template <int N>
  static COMPRESS_HD F lookup(const float* table, F index) {
    const I place = __builtin_convertvector(index, I);
#if defined(__AVX512F__)
    return (F)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)place, _mm512_loadu_ps(table));
#elif defined(__AVX2__)
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)place);
    if constexpr (N <= 8) return (F)low;
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)place);
    return (F)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32((__m256i)place, 28)));
#else
    F found;
    for (int i = 0; i < kLanes; ++i) found[i] = table[place[i] & (N - 1)];
    return found;
#endif
  }
};

#else

using Lanes = OneLane;

#endif

}  // namespace
}  // namespace compress
