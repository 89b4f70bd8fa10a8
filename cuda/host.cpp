// The CPU backend: loops over groups around the per-group code of the headers, with a plain C interface.
//
// Every function takes dense arrays and a number of threads, and returns the number of groups that it had to refuse
// (0: all is well). compress/ops/native.py calls them and must agree on compress_interface().
#include <cstdint>
#include <type_traits>

#include "api.h"
#include "bits.cuh"
#include "fischer.cuh"

namespace {

// Calls `loop` with the number of words as a constant, or with 0 where there is no loop of that number.
template <typename Loop>
int64_t with_words(int words, Loop loop) {
  switch (words) {
    case 1: return loop(std::integral_constant<int, 1>());
    case 2: return loop(std::integral_constant<int, 2>());
    case 3: return loop(std::integral_constant<int, 3>());
    case 4: return loop(std::integral_constant<int, 4>());
    default: return loop(std::integral_constant<int, 0>());
  }
}

// The number of groups for which `done` is false.
template <typename Done>
int64_t refusals(int64_t groups, int threads, Done done) {
  (void)threads;
  int64_t refused = 0;
#pragma omp parallel for schedule(static) reduction(+ : refused) num_threads(threads)
  for (int64_t g = 0; g < groups; ++g) refused += !done(g);
  return refused;
}

}  // namespace

COMPRESS_API int compress_interface() { return 6; }

COMPRESS_API int64_t compress_pyramid_rank(const int8_t* y, const uint64_t* table, int words, int64_t groups, int dim,
                                           int pulses, int limit, uint64_t* index, int threads) {
  return with_words(words, [&](auto count) {
    constexpr int W = decltype(count)::value;
    return refusals(groups, threads, [&](int64_t g) {
      return compress::fischer_rank<W>(y + g * dim, table, words, dim, pulses, limit, index + g * words);
    });
  });
}

COMPRESS_API int64_t compress_pyramid_unrank(const uint64_t* index, const uint64_t* table, int words, int64_t groups,
                                             int dim, int pulses, int limit, int8_t* y, int threads) {
  return with_words(words, [&](auto count) {
    constexpr int W = decltype(count)::value;
    return refusals(groups, threads, [&](int64_t g) {
      return compress::fischer_unrank<W>(index + g * words, table, words, dim, pulses, limit, y + g * dim);
    });
  });
}

COMPRESS_API int64_t compress_pack_bits(const int64_t* values, int64_t count, int width, uint8_t* out, int threads) {
  (void)threads;
  const int64_t runs = (count + 7) / 8, words = (width + 63) / 64;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < runs; ++r) {
    const int64_t left = count - r * 8;
    compress::pack_run(values + r * 8 * words, left < 8 ? static_cast<int>(left) : 8, width, out + r * width);
  }
  return 0;
}

COMPRESS_API int64_t compress_unpack_bits(const uint8_t* packed, int64_t count, int width, int64_t* values,
                                          int threads) {
  (void)threads;
  const int64_t runs = (count + 7) / 8, words = (width + 63) / 64;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < runs; ++r) {
    const int64_t left = count - r * 8;
    compress::unpack_run(packed + r * width, left < 8 ? static_cast<int>(left) : 8, width, values + r * 8 * words);
  }
  return 0;
}
