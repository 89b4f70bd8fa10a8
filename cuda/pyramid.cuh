// The integer pyramid, one group at a time, for the CPU and the GPU.
//
// A group is D floats; its code is a gain level and an integer vector y with sum |y_i| = K and |y_i| <= limit. The
// definition, with the order of every float operation, is compress/ops/reference.py; this file must give the same
// bits. So: no fused multiply-add (compile with -ffp-contract=off, nvcc -fmad=false), sums as a tree over P lanes,
// where P is D rounded up to a power of two and the lanes above D hold zeros and can take no pulse.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define COMPRESS_HD __host__ __device__ __forceinline__
#else
#define COMPRESS_HD inline
#endif

namespace compress {

constexpr float kLargestRatio = 1048576.0f;

// Sum of v[0..P) by halves. Recursion gives every loop a fixed length, so that all of it stays in registers.
template <int P>
COMPRESS_HD float tree_sum(const float* v) {
  if constexpr (P == 1) {
    return v[0];
  } else {
    float half[P / 2];
    for (int i = 0; i < P / 2; ++i) half[i] = v[i] + v[i + P / 2];
    return tree_sum<P / 2>(half);
  }
}

template <int P>
COMPRESS_HD float largest(const float* v) {
  if constexpr (P == 1) {
    return v[0];
  } else {
    float half[P / 2];
    for (int i = 0; i < P / 2; ++i) half[i] = v[i] > v[i + P / 2] ? v[i] : v[i + P / 2];
    return largest<P / 2>(half);
  }
}

// The lowest index of the largest merit.
template <int P>
COMPRESS_HD int first_largest(const float* merit) {
  const float best = largest<P>(merit);
  int i = 0;
  while (i < P - 1 && merit[i] != best) ++i;
  return i;
}

// Rounds q after the common shift theta that about makes the sum right; returns the sum.
template <int P>
COMPRESS_HD int round_shifted(const float* q, const float* capacity, float theta, float* y) {
  int sum = 0;
  for (int i = 0; i < P; ++i) {
    float v = q[i] - theta;
    v = v > 0.0f ? v : 0.0f;
    v = v < capacity[i] ? v : capacity[i];
    const int whole = static_cast<int>(v + 0.5f);
    y[i] = static_cast<float>(whole);
    sum += whole;
  }
  return sum;
}

// Brings sum y to `pulses` by the cheapest single steps.
template <int P>
COMPRESS_HD void repair(const float* q, const float* capacity, int sum, int pulses, float* y) {
  float merit[P];
  for (; sum < pulses; ++sum) {
    for (int i = 0; i < P; ++i) merit[i] = y[i] < capacity[i] ? q[i] - y[i] : -INFINITY;
    y[first_largest<P>(merit)] += 1.0f;
  }
  for (; sum > pulses; --sum) {
    for (int i = 0; i < P; ++i) merit[i] = y[i] > 0.0f ? y[i] - q[i] : -INFINITY;
    y[first_largest<P>(merit)] -= 1.0f;
  }
}

// Whether no y of the level can have an error below `best`. Rounding after a shift by theta minimises the Lagrangian
// sum (q - y)^2 + 2 theta (sum y - K), so its value, times level^2, bounds the level's error from below. The margin is
// a hundred times the rounding of these sums: a level that is passed over could not have won, so the result is the same.
template <int P>
COMPRESS_HD bool cannot_win(const float* q, const float* y, float theta, int excess, float level, float best) {
  float square[P];
  for (int i = 0; i < P; ++i) square[i] = (q[i] - y[i]) * (q[i] - y[i]);
  const float distance = tree_sum<P>(square);
  const float price = 2.0f * theta * static_cast<float>(excess);
  const float margin = 1e-4f * (distance + (price < 0.0f ? -price : price));
  return level * level * (distance + price - margin) > best;
}

// The codebook's first vector: the last coordinates carry as much as they may.
COMPRESS_HD void first_codeword(int dim, int pulses, int limit, int8_t* y) {
  for (int i = dim - 1; i >= 0; --i) {
    const int here = pulses < limit ? pulses : limit;
    y[i] = static_cast<int8_t>(here);
    pulses -= here;
  }
}

// A level to begin with, near the best: the larger of those that match the group's L1 norm.
template <int P>
COMPRESS_HD int first_guess(const float* a, const float* levels, int level_count, int pulses) {
  const float total = tree_sum<P>(a);
  int j = 0;
  while (j < level_count - 1 && levels[j] * static_cast<float>(pulses) < total) ++j;
  return j;
}

// Exact joint encode of one group: y[dim] and the returned level minimise ||x - scale * levels[j] * y||^2.
template <int P>
COMPRESS_HD int encode_group(const float* x, int dim, float scale, const float* levels, const float* inverse_levels,
                             int level_count, int pulses, int limit, int8_t* y) {
  if (scale == 0.0f) {
    first_codeword(dim, pulses, limit, y);
    return 0;
  }
  float a[P], q[P], capacity[P], word[P], best_word[P];
  for (int i = 0; i < P; ++i) {
    float ratio = 0.0f;
    if (i < dim) ratio = (x[i] < 0.0f ? -x[i] : x[i]) / scale;
    a[i] = ratio < kLargestRatio ? ratio : kLargestRatio;
    capacity[i] = i < dim ? static_cast<float>(limit) : 0.0f;
    best_word[i] = 0.0f;
  }
  const float inverse_dim = 1.0f / static_cast<float>(dim);
  const int start = first_guess<P>(a, levels, level_count, pulses);
  float best = INFINITY;
  int gain = 0;
  for (int step = 0; step < level_count; ++step) {
    const int j = step == 0 ? start : (step <= start ? step - 1 : step);
    for (int i = 0; i < P; ++i) q[i] = a[i] * inverse_levels[j];
    const float theta = (tree_sum<P>(q) - static_cast<float>(pulses)) * inverse_dim;
    const int sum = round_shifted<P>(q, capacity, theta, word);
    if (cannot_win<P>(q, word, theta, sum - pulses, levels[j], best)) continue;
    repair<P>(q, capacity, sum, pulses, word);
    for (int i = 0; i < P; ++i) {
      const float product = levels[j] * word[i];
      const float residual = a[i] - product;
      q[i] = residual * residual;
    }
    const float error = tree_sum<P>(q);
    if (step == 0 || error < best || (error == best && j < gain)) {
      best = error;
      gain = j;
      for (int i = 0; i < P; ++i) best_word[i] = word[i];
    }
  }
  for (int i = 0; i < dim; ++i) {
    const int magnitude = static_cast<int>(best_word[i]);
    y[i] = static_cast<int8_t>(x[i] < 0.0f ? -magnitude : magnitude);
  }
  return gain;
}

// Index of y, or -1 when y is not in the codebook. words[d * (pulses + 1) + k] = N(d, k) as in compress/ops/tables.py.
COMPRESS_HD int64_t rank_group(const int8_t* y, const int64_t* words, int dim, int pulses, int limit) {
  int64_t index = 0;
  int left = pulses;
  for (int i = 0; i < dim; ++i) {
    const int magnitude = y[i] < 0 ? -y[i] : y[i];
    if (magnitude > left || magnitude > limit) return -1;
    const int64_t* row = words + static_cast<int64_t>(dim - 1 - i) * (pulses + 1);
    if (magnitude > 0) index += row[left];
    for (int m = 1; m < magnitude; ++m) index += 2 * row[left - m];
    left -= magnitude;
    if (y[i] < 0) index += row[left];
  }
  return left == 0 ? index : -1;
}

// The vector of an index; the inverse of rank_group. The index must lie in [0, N(dim, pulses)).
COMPRESS_HD void unrank_group(int64_t index, const int64_t* words, int dim, int pulses, int8_t* y) {
  int left = pulses;
  for (int i = 0; i < dim; ++i) {
    const int64_t* row = words + static_cast<int64_t>(dim - 1 - i) * (pulses + 1);
    int magnitude = 0;
    bool negative = false;
    if (index >= row[left]) {
      index -= row[left];
      magnitude = 1;
      while (index >= 2 * row[left - magnitude]) {
        index -= 2 * row[left - magnitude];
        ++magnitude;
      }
      negative = index >= row[left - magnitude];
      if (negative) index -= row[left - magnitude];
    }
    left -= magnitude;
    y[i] = static_cast<int8_t>(negative ? -magnitude : magnitude);
  }
}

}  // namespace compress
