// The encoder of all pyramids, templated on a lane type: a float is one group of a GPU thread or of a test, a SIMD
// vector is as many groups as it has lanes. Lanes never meet, so the results are the same.
//
// A group is x [D]; a candidate is a gain S and the sign e of a shift d. With q_i = |x_i / (scale S) - e d| it wants
//
//     min sum_i (q_i - t[m_i])^2   over   0 <= m_i <= limit,  sum m_i = K
//
// for ascending levels t whose steps do not grow and whose squares' steps do not shrink: then the gain of one more
// pulse
//
//     up(m) = c1[m] q - c0[m],     c1[m] = 2 (t[m+1] - t[m]),     c0[m] = t[m+1]^2 - t[m]^2
//
// falls with m for every q >= 0. So the problem is separable and convex, and m is optimal when its sum is K and no
// pulse gains by moving from one coordinate to another. From a guess whose sum is about right, single best steps repair
// the sum and then move pulses while that helps, a few steps in all. They end: the order of floats a and -b is that of
// the real numbers, so every move raises the same sum of terms. The best candidate is the joint optimum of gain, coset
// and shape. Each lane begins with the gain that its L1 norm asks for and goes outwards from it; a candidate is passed
// over where it cannot win, for sum (q - t)^2 >= (sum q - sum t)^2 / D and sum t is all but fixed.
//
// The definition, with the order of every float operation, is compress/ops/search.py; this file gives the same bits.
// So: no fused multiply-add (compile with -ffp-contract=off, nvcc -fmad=false), and sums run over i = 0, 1, ... D-1.
#pragma once

#include <cmath>
#include <cstdint>

#include "macros.cuh"

namespace compress {

constexpr float kLargestRatio = 1048576.0f;  // of a weight and the row's scale
constexpr float kLargestStep = 16384.0f;     // q above it counts as this much when pulses are spread
constexpr int kLevels = 16;

// What a search needs; pointers may be to shared memory. Level m is t[m] where `table` says so, else m step + start.
struct Search {
  int dim, pulses, limit, gains;
  float shift;           // d; 0: no coset
  float slope, offset;   // of the guess: t[m] is about (m + offset) / slope
  float least, most;     // sum t[m_i] lies between them
  const float* gain;     // [gains] S
  const float* inverse;  // [gains] 1 / S
  bool table;
  float step, start;                 // t[m] = start + m step
  const float *level, *rise, *cost;  // [16] t, c1, c0
};

// One lane. Vectors of lanes: lanes.h.
struct OneLane {
  using F = float;
  using I = int32_t;
  using M = bool;
  static constexpr int kCount = 1;
  static COMPRESS_HD bool any(bool mask) { return mask; }
  static COMPRESS_HD bool without(bool mask, bool other) { return mask && !other; }
  static COMPRESS_HD float select(bool mask, float a, float b) { return mask ? a : b; }
  static COMPRESS_HD float larger(float a, float b) { return a > b ? a : b; }
  static COMPRESS_HD float smaller(float a, float b) { return a < b ? a : b; }
  static COMPRESS_HD float truncate(float a) { return static_cast<float>(static_cast<int32_t>(a)); }
  template <int N>  // 8 or 16 entries
  static COMPRESS_HD float lookup(const float* table, float index) {
    return table[static_cast<int32_t>(index) & (N - 1)];
  }
  static COMPRESS_HD float gather(const float* table, float index) { return table[static_cast<int32_t>(index)]; }
  static COMPRESS_HD float all(float a) { return a; }
};

// The levels of a search as functions of m, a float with a whole number.
template <class L>
struct UniformLevels {
  using F = typename L::F;
  static constexpr bool kMoves = false;
  float step, start, rise, square, across;
  explicit COMPRESS_HD UniformLevels(const Search& s)
      : step(s.step), start(s.start), rise(2.0f * s.step), square(s.step * s.step), across(2.0f * s.step * s.start) {}
  COMPRESS_HD F level(F m) const { return m * step + start; }
  COMPRESS_HD F up(F q, F m) const { return q * rise - ((m + m + 1.0f) * square + across); }
};

// N: entries of the tables, 8 or 16.
template <class L, int N>
struct TableLevels {
  using F = typename L::F;
  static constexpr bool kMoves = true;
  const float *table, *rise, *cost;
  explicit COMPRESS_HD TableLevels(const Search& s) : table(s.level), rise(s.rise), cost(s.cost) {}
  COMPRESS_HD F level(F m) const { return L::template lookup<N>(table, m); }
  COMPRESS_HD F up(F q, F m) const { return q * L::template lookup<N>(rise, m) - L::template lookup<N>(cost, m); }
};

// m is a guess of about the right sum: q after a common shift, rounded. Returns K - sum m.
template <class L, int D>
COMPRESS_HD typename L::F guess_pulses(const Search& s, const typename L::F* q, typename L::F* m) {
  using F = typename L::F;
  const int dim = D > 0 ? D : s.dim;
  const float limit = static_cast<float>(s.limit), pulses = static_cast<float>(s.pulses);
  F total = L::all(0.0f), missing = L::all(pulses);
  for (int i = 0; i < dim; ++i) {
    m[i] = q[i] * s.slope - s.offset;
    total = total + m[i];
  }
  const F theta = (total - pulses) * (1.0f / static_cast<float>(dim)) - 0.5f;
  for (int i = 0; i < dim; ++i) {
    m[i] = L::truncate(L::smaller(L::larger(m[i] - theta, L::all(0.0f)), L::all(limit)));
    missing = missing - m[i];
  }
  return missing;
}

// Brings the sum of m to K by the best single steps.
template <class L, int D, class Levels>
COMPRESS_HD void repair_sum(const Search& s, const Levels& levels, const typename L::F* q, typename L::F missing,
                            typename L::F* m, typename L::F* merit) {
  using F = typename L::F;
  using M = typename L::M;
  const int dim = D > 0 ? D : s.dim;
  const F none = L::all(0.0f), one = L::all(1.0f), never = L::all(-INFINITY);
  const M rising = missing > 0.0f;
  const F direction = L::select(rising, one, -one), below = L::select(rising, none, one);
  const F bound = L::select(rising, L::all(static_cast<float>(s.limit)), none);
  if (!L::any(missing != 0.0f)) return;
  F best = never;
  for (int i = 0; i < dim; ++i) {
    merit[i] = L::select(m[i] == bound, never, levels.up(q[i], m[i] - below) * direction);
    best = L::larger(merit[i], best);
  }
  for (;;) {
    M open = missing != 0.0f;
    missing = missing - L::select(open, direction, none);
    F next = never;
    for (int i = 0; i < dim; ++i) {
      const M hit = open & (merit[i] == best);
      open = L::without(open, hit);
      m[i] = m[i] + L::select(hit, direction, none);
      merit[i] = L::select(m[i] == bound, never, levels.up(q[i], m[i] - below) * direction);
      next = L::larger(merit[i], next);
    }
    if (!L::any(missing != 0.0f)) return;
    best = next;
  }
}

// Moves pulses from one coordinate to another while that helps. After a guess that rounds uniform levels there is
// nothing to move.
template <class L, int D, class Levels>
COMPRESS_HD void move_pulses(const Search& s, const Levels& levels, const typename L::F* q, typename L::F* m,
                             typename L::F* up, typename L::F* down) {
  using F = typename L::F;
  using M = typename L::M;
  const int dim = D > 0 ? D : s.dim;
  const F none = L::all(0.0f), one = L::all(1.0f), never = L::all(-INFINITY);
  const F most = L::all(static_cast<float>(s.limit));
  for (;;) {
    F best_up = never, best_down = never;
    for (int i = 0; i < dim; ++i) {
      up[i] = L::select(m[i] == most, never, levels.up(q[i], m[i]));
      down[i] = L::select(m[i] == none, never, -levels.up(q[i], m[i] - one));
      best_up = L::larger(up[i], best_up);
      best_down = L::larger(down[i], best_down);
    }
    M rising = best_up + best_down > 0.0f, falling = rising;
    if (!L::any(rising)) return;
    for (int i = 0; i < dim; ++i) {
      const M rises = rising & (up[i] == best_up), falls = falling & (down[i] == best_down);
      rising = L::without(rising, rises);
      falling = L::without(falling, falls);
      m[i] = m[i] + L::select(rises, one, none) - L::select(falls, one, none);
    }
  }
}

// Exact joint encode of the groups in the lanes of x [D]: values [D] are s_i t[m_i] + e d, as floats; gain and coset
// (1: e = -1) belong to them. scale >= 0; where it is 0 the group becomes the codebook's first, which is for the
// caller.
template <class L, int D, class Levels>
COMPRESS_HD void encode_lanes(const Search& s, const Levels& levels, const typename L::F* x, typename L::F scale,
                              typename L::F* values, typename L::F& gain, typename L::F& coset) {
  using F = typename L::F;
  using M = typename L::M;
  constexpr int kRoom = D > 0 ? D : 128;
  const int dim = D > 0 ? D : s.dim;
  const F none = L::all(0.0f);
  F a[kRoom], q[kRoom], m[kRoom], up[kRoom], down[kRoom];
  for (int i = 0; i < dim; ++i) {
    F ratio = x[i] / scale;
    ratio = L::smaller(ratio, L::all(kLargestRatio));
    a[i] = L::larger(ratio, L::all(-kLargestRatio));
    values[i] = none;
  }
  F length = none;
  for (int i = 0; i < dim; ++i) length = length + L::larger(a[i], -a[i]);
  const F middle = L::all(0.5f * (s.least + s.most)), last = L::all(static_cast<float>(s.gains - 1));
  F start = none;
  for (int j = 0; j < s.gains - 1; ++j) start = start + L::select(middle * s.gain[j] < length, L::all(1.0f), none);
  F best = L::all(INFINITY), best_place = L::all(INFINITY);
  const int sides = s.shift > 0.0f ? 2 : 1;
  for (int step = 0; step < s.gains; ++step) {
    F j = start + static_cast<float>(step % 2 == 0 ? step / 2 : -(step + 1) / 2);
    j = j + L::select(j < none, last + 1.0f, none) - L::select(j > last, last + 1.0f, none);
    const F size = L::gather(s.gain, j), inverse = L::gather(s.inverse, j);
    for (int e = 0; e < sides; ++e) {
      const float shift = e == 0 ? s.shift : -s.shift;
      F total = none;
      for (int i = 0; i < dim; ++i) {
        const F v = a[i] * inverse - shift;
        const F magnitude = L::select(v < 0.0f, -v, v);
        total = total + magnitude;
        q[i] = L::smaller(magnitude, L::all(kLargestStep));
      }
      const F gap = L::larger(L::larger(total - s.most, s.least - total) - total * 1e-5f, none);
      if (!L::any(gap * gap * (size * size) * (0.9999f / static_cast<float>(dim)) <= best)) continue;
      const F missing = guess_pulses<L, D>(s, q, m);
      repair_sum<L, D>(s, levels, q, missing, m, up);
      if (Levels::kMoves) move_pulses<L, D>(s, levels, q, m, up, down);
      F error = none;
      for (int i = 0; i < dim; ++i) {
        const F v = a[i] * inverse - shift;
        m[i] = levels.level(m[i]);
        const F residual = L::select(v < 0.0f, -v, v) - m[i];
        error = error + residual * residual;
        m[i] = L::select(v < 0.0f, -m[i], m[i]) + shift;
      }
      error = error * (size * size);
      const F place = j + j + static_cast<float>(e);
      const M better = (error < best) | ((error == best) & (place < best_place));
      if (!L::any(better)) continue;
      best = L::select(better, error, best);
      best_place = L::select(better, place, best_place);
      for (int i = 0; i < dim; ++i) values[i] = L::select(better, m[i], values[i]);
    }
  }
  gain = L::truncate(best_place * 0.5f);
  coset = best_place - gain - gain;
}

}  // namespace compress
