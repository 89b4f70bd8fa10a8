// Divergences between p = softmax(z_t / T) and q = softmax(z_s / T), one class at a time, for the CPU and the GPU.
//
// With u = log p - log q, a divergence is a sum over the classes of f, and a = q df/dq gives its gradient with respect
// to the student's logits: a - q sum a (compress/losses/divergence.py). Every f here is non-negative and is computed
// without cancellation: from expm1(-u) + u and x - log1p(x), never from p log p - p log q. The functions have no
// branches, so that a compiler turns a loop over classes into vector instructions; it may fuse multiplications with
// additions, but not reorder sums. Polynomials are minimax in relative error, which is given at each.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define COMPRESS_LANE __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define COMPRESS_LANE __forceinline
#else
#define COMPRESS_LANE inline __attribute__((always_inline))
#endif

namespace compress {

constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23: x + kWhole has round(x) in its last bits, for |x| < 2^22
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693359375f, kLn2Rest = -2.12194440e-4f;  // their sum is ln 2; k kLn2 is exact for k < 2^14
constexpr float kSmallestExponent = -87.0f;
constexpr float kHeld = 40.0f, kHeldRatio = 4.24835426e-18f;  // where mixtures hold |u|, and e^-40

COMPRESS_LANE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

COMPRESS_LANE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// By masks, since a compiler makes branches of some conditional expressions, and branches stop it from vectorising.
COMPRESS_LANE float select(bool condition, float yes, float no) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return float_of((bits_of(yes) & mask) | (bits_of(no) & ~mask));
}

// The second where one is no number.
COMPRESS_LANE float larger(float a, float b) { return a > b ? a : b; }
COMPRESS_LANE float smaller(float a, float b) { return a < b ? a : b; }

// 0 where the weight is 0, also for an infinite x.
COMPRESS_LANE float weighted(float weight, float x) { return select(weight > 0.0f, weight * x, 0.0f); }

// x = k ln 2 + r with |r| <= ln 2 / 2; shifted is k + kWhole.
struct Reduced {
  float shifted, r;
};

COMPRESS_LANE Reduced reduced(float x) {
  const float shifted = x * kLog2E + kWhole;
  const float k = shifted - kWhole;
  return {shifted, (x - k * kLn2) - k * kLn2Rest};
}

// (e^r - 1 - r) / r^2 = even(r^2) + r odd(r^2), to 3e-9 of e^r where |r| <= ln 2 / 2.
COMPRESS_LANE float exp_even(float square) { return 0.49999994f + square * (0.0416683629f + square * 0.00138152658f); }
COMPRESS_LANE float exp_odd(float square) { return 0.166665226f + square * 0.00836860482f; }

// e^x for x <= 0; 0 below -87, where a float32 begins to lose digits.
COMPRESS_LANE float exp_negative(float x) {
  const Reduced at = reduced(x);
  const float square = at.r * at.r;
  const float power = float_of((bits_of(at.shifted) << 23) + 0x3f800000u);
  const float e = 1.0f + (at.r + square * (exp_even(square) + at.r * exp_odd(square)));
  return select(x < kSmallestExponent, 0.0f, e * power);
}

// e^-u and e^u, and each less one, for |u| <= 86.
struct Ratios {
  float down, up, down_less, up_less;
};

COMPRESS_LANE Ratios ratios(float u) {
  const Reduced at = reduced(-u);
  const float square = at.r * at.r;
  const float even = square * exp_even(square), odd = at.r + square * (at.r * exp_odd(square));
  const uint32_t power = bits_of(at.shifted) << 23;
  const float down = float_of(0x3f800000u + power), up = float_of(0x3f800000u - power);
  const float fall = down * (even + odd), rise = up * (even - odd);
  return {down + fall, up + rise, (down - 1.0f) + fall, (up - 1.0f) + rise};
}

// expm1(-u) + u and expm1(u) - u for |u| <= 1, to 1e-8.
struct Excess {
  float forward, reverse;
};

COMPRESS_LANE Excess excess(float u) {
  const float square = u * u;
  const float even = 0.5f + square * (0.041666735f + square * (0.00138854515f + square * 2.53548296e-05f));
  const float odd =
      u * (0.166666672f + square * (0.00833331048f + square * (0.000198440233f + square * 2.77228332e-06f)));
  return {square * (even - odd), square * (even + odd)};
}

// log(y) and x - log(y) for x = y - 1, both to the last digits: x is exact near 0, y near -1.
struct Log {
  float log, rest;
};

COMPRESS_LANE Log log_of(float x, float y) {
  const uint32_t bits = bits_of(y);
  const int32_t whole = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;  // y / 2^whole lies in [sqrt(1/2), sqrt(2))
  const float m = float_of(bits - (static_cast<uint32_t>(whole) << 23));
  const float k = static_cast<float>(whole);
  const float s = select(whole == 0, x, m - 1.0f);
  // (log(1 + s) - s + s^2/2) / s^3, to 6e-8 of s^2/2
  float tail = -0.0808919147f;
  tail = 0.128630742f + s * tail;
  tail = -0.130377337f + s * tail;
  tail = 0.141814098f + s * tail;
  tail = -0.166340053f + s * tail;
  tail = 0.200023338f + s * tail;
  tail = -0.250005305f + s * tail;
  tail = 0.333333194f + s * tail;
  const float rest = s * s * (0.5f - s * tail) - k * kLn2Rest;
  return {(k * kLn2 + s) - rest, ((x - s) - k * kLn2) + rest};
}

// f, and a = q df/dq.
struct Term {
  float f, a;
};

// `inner` where |u| < 1, which is where `excess` holds.
COMPRESS_LANE float by_distance(float u, float inner, float outer) {
  return select(float_of(bits_of(u) & 0x7fffffffu) < 1.0f, inner, outer);
}

// q - p. Where u is small the difference of the two would cancel.
COMPRESS_LANE float gap(float p, float q, float u) { return by_distance(u, p * (excess(u).forward - u), q - p); }

// KL(p || q). Here sum a is 0 but for the rounding of u. To take it off keeps the digits of a small gradient.
struct ForwardKL {
  COMPRESS_LANE Term operator()(float p, float q, float u) const {
    const float a = gap(p, q, u);
    return {by_distance(u, p * excess(u).forward, weighted(p, u) + a), a};
  }
};

// KL(q || p).
struct ReverseKL {
  COMPRESS_LANE Term operator()(float p, float q, float u) const {
    const float a = -weighted(q, u);
    return {by_distance(u, q * excess(u).reverse, a - gap(p, q, u)), a};
  }
};

// w KL(p || q) + (1 - w) KL(q || p).
struct SymmetricKL {
  float w, v;  // v = 1 - w
  COMPRESS_LANE Term operator()(float p, float q, float u) const {
    const Excess e = excess(u);
    const float apart = gap(p, q, u), forward = weighted(p, u), reverse = -weighted(q, u);
    const float inner = w * (p * e.forward) + v * (q * e.reverse);
    return {by_distance(u, inner, (w - v) * apart + (w * forward + v * reverse)), w * apart + v * reverse};
  }
};

// sum |p - q| / 2.
struct TotalVariation {
  COMPRESS_LANE Term operator()(float p, float q, float u) const {
    const float apart = gap(p, q, u), half = 0.5f * q;
    return {select(u < 0.0f, 0.5f * apart, -0.5f * apart), select(u < 0.0f, half, select(u > 0.0f, -half, 0.0f))};
  }
};

// What a divergence from a mixture sees of a class. Where |u| > 40 it is held there, and the smaller of p and q raised
// to e^-40 of the larger: no float32 sum or difference of the two feels it, and every form below holds for every u.
struct Held {
  float p, q, u;
};

COMPRESS_LANE Held held(float p, float q, float u) {
  return {larger(p, q * kHeldRatio), larger(q, p * kHeldRatio), larger(-kHeld, smaller(kHeld, u))};
}

// KL(p || m) with m = w p + (1 - w) q; m / p = 1 + x.
struct SkewKL {
  float w, v;
  COMPRESS_LANE Term operator()(float p, float q, float u) const {
    const Held h = held(p, q, u);
    const Ratios e = ratios(h.u);
    const float x = v * e.down_less, y = w + v * e.down;
    return {h.p * log_of(x, y).rest, v * (h.q * (x / y))};
  }
};

// KL(q || m) with m = w q + (1 - w) p; m / q = 1 + x.
struct ReverseSkewKL {
  float w, v;
  COMPRESS_LANE Term operator()(float p, float q, float u) const {
    const Held h = held(p, q, u);
    const Ratios e = ratios(h.u);
    const float x = v * e.up_less, y = w + v * e.up;
    const Log l = log_of(x, y);
    return {h.q * l.rest, h.q * (w * (x / y) - l.log)};
  }
};

// w KL(p || m) + (1 - w) KL(q || m) with m = w p + (1 - w) q.
struct JensenShannon {
  float w, v;
  COMPRESS_LANE Term operator()(float p, float q, float u) const {
    const Held h = held(p, q, u);
    const Ratios e = ratios(h.u);
    const Log by_p = log_of(v * e.down_less, w + v * e.down);
    const Log by_q = log_of(w * e.up_less, v + w * e.up);
    return {w * (h.p * by_p.rest) + v * (h.q * by_q.rest), -v * (h.q * by_q.log)};
  }
};

}  // namespace compress
