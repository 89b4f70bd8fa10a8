// The CPU backend: loops over groups around the per-group code of the headers, with a plain C interface.
//
// Every function takes dense arrays and a number of threads, and returns the number of groups that it had to refuse
// (0: all is well). compress/ops/native.py calls them and must agree on compress_interface().
#include <cmath>
#include <cstdint>
#include <vector>

#include "api.h"
#include "bits.cuh"
#include "pyramid.cuh"

namespace {

template <int P>
void encode_all(const float* x, const float* scale, const float* levels, const float* inverse, int64_t groups, int dim,
                int level_count, int pulses, int limit, int8_t* y, int64_t* gain, int threads) {
  (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t g = 0; g < groups; ++g)
    gain[g] = compress::encode_group<P>(x + g * dim, dim, scale[g], levels, inverse, level_count, pulses, limit,
                                        y + g * dim);
}

}  // namespace

COMPRESS_API int compress_interface() { return 2; }

COMPRESS_API int64_t compress_pyramid_encode(const float* x, const float* scale, const float* levels, int64_t groups,
                                             int dim, int level_count, int pulses, int limit, int8_t* y, int64_t* gain,
                                             int threads) {
  std::vector<float> inverse(level_count);
  for (int j = 0; j < level_count; ++j) inverse[j] = 1.0f / levels[j];
#define COMPRESS_ENCODE(P)                                                                                       \
  if (dim <= P) {                                                                                                \
    encode_all<P>(x, scale, levels, inverse.data(), groups, dim, level_count, pulses, limit, y, gain, threads); \
    return 0;                                                                                                    \
  }
  COMPRESS_ENCODE(1)
  COMPRESS_ENCODE(2)
  COMPRESS_ENCODE(4)
  COMPRESS_ENCODE(8)
  COMPRESS_ENCODE(16)
  COMPRESS_ENCODE(32)
  COMPRESS_ENCODE(64)
  COMPRESS_ENCODE(128)
  COMPRESS_ENCODE(256)
#undef COMPRESS_ENCODE
  return groups;
}

COMPRESS_API int64_t compress_pyramid_rank(const int8_t* y, const int64_t* words, int64_t groups, int dim, int pulses,
                                           int limit, int64_t* index, int threads) {
  (void)threads;
  int64_t refused = 0;
#pragma omp parallel for schedule(static) reduction(+ : refused) num_threads(threads)
  for (int64_t g = 0; g < groups; ++g) {
    index[g] = compress::rank_group(y + g * dim, words, dim, pulses, limit);
    refused += index[g] < 0;
  }
  return refused;
}

COMPRESS_API int64_t compress_pyramid_unrank(const int64_t* index, const int64_t* words, int64_t groups, int dim,
                                             int pulses, int8_t* y, int threads) {
  (void)threads;
  const int64_t size = words[static_cast<int64_t>(dim) * (pulses + 1) + pulses];
  int64_t refused = 0;
#pragma omp parallel for schedule(static) reduction(+ : refused) num_threads(threads)
  for (int64_t g = 0; g < groups; ++g) {
    if (index[g] < 0 || index[g] >= size)
      ++refused;
    else
      compress::unrank_group(index[g], words, dim, pulses, y + g * dim);
  }
  return refused;
}

COMPRESS_API int64_t compress_pack_bits(const int64_t* values, int64_t count, int width, uint8_t* out, int threads) {
  (void)threads;
  const int64_t runs = (count + 7) / 8;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < runs; ++r) {
    const int64_t left = count - r * 8;
    compress::pack_run(values + r * 8, left < 8 ? static_cast<int>(left) : 8, width, out + r * width);
  }
  return 0;
}

COMPRESS_API int64_t compress_unpack_bits(const uint8_t* packed, int64_t count, int width, int64_t* values,
                                          int threads) {
  (void)threads;
  const int64_t runs = (count + 7) / 8;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < runs; ++r) {
    const int64_t left = count - r * 8;
    compress::unpack_run(packed + r * width, left < 8 ? static_cast<int>(left) : 8, width, values + r * 8);
  }
  return 0;
}
