// The loops in AVX2: included by half_prepared_blocks.cpp. A unit of eight octets comes as two registers of indices,
// the low and the high halves of the octets, four bytes each; so a dot product of bytes leaves one integer for each
// octet.
//
// Floats need no conversion of integers: a level below 128 is a bfloat16, whose two bytes two shuffles look up. Bytes
// are interleaved to words, and a word in the upper half of a lane is the float. That orders octets as 0 0 1 1 4 4 5 5
// and 2 2 3 3 6 6 7 7, which is how an unpacking of the gains with themselves orders those.
#pragma once

#include <immintrin.h>

namespace compress {
namespace {

inline __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// The weight that a place among 64 floats stands for, in units of the octets' natural order.
inline constexpr int weight_at(int place) {
  const int odd = place >> 3 & 1, high = place >> 4 & 1, second = place >> 5, lane = place & 7;
  const int octet = 4 * (lane >> 2) + 2 * second + (lane >> 1 & 1);
  return 8 * octet + 4 * high + 2 * (lane & 1) + odd;
}

void arrange_floats(const float* x, int64_t chunks, float* out) {
  for (int64_t i = 0; i < chunks * 256; i += 64)
    for (int place = 0; place < 64; ++place) out[i + place] = x[i + weight_at(place)];
}

void arrange_integers(const int8_t* x, int64_t chunks, int8_t* out) {
  for (int64_t i = 0; i < chunks * 256; i += 64)
    for (int g = 0; g < 8; ++g) {
      memcpy(out + i + 4 * g, x + i + 8 * g, 4);
      memcpy(out + i + 32 + 4 * g, x + i + 8 * g + 4, 4);
    }
}

// Bytes of all indices, 16 at once. Where the sign is a bit of the index, `negative` changes the second eight.
struct ByteTable {
  __m256i first, second;

  template <class Byte>
  static ByteTable of(const PreparedCode& code, int negative, const Byte& byte) {
    uint8_t bytes[32] = {};
    for (int m = 0; m <= code.limit; ++m) bytes[m] = byte(code.levels[m]);
    if (code.limit <= 7)
      for (int m = 0; m < 8; ++m) bytes[m + 8] = static_cast<uint8_t>(bytes[m] ^ negative);
    return {doubled(bytes), doubled(bytes + 16)};
  }

 private:
  static __m256i doubled(const uint8_t* bytes) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  }
};

// Half a unit: indices, and bytes whose highest bits are the signs and the indices' fifth bits. kPlanes is 0, 1 or 2:
// of signs, and of uppers.
template <int kPlanes>
struct Half {
  __m256i indices, signs, uppers;

  __m256i look_up(const ByteTable& table) const {
    const __m256i low = _mm256_shuffle_epi8(table.first, indices);
    if constexpr (kPlanes < 2) return low;
    return _mm256_blendv_epi8(low, _mm256_shuffle_epi8(table.second, indices), uppers);
  }
};

template <int kPlanes, int kUnit, bool kHigh>
inline Half<kPlanes> half_of(const uint8_t* chunk) {
  constexpr int kUp = 7 - 2 * kUnit - kHigh;
  const __m256i packed = load(chunk + 32 * kUnit);
  Half<kPlanes> half{};
  half.indices = _mm256_and_si256(kHigh ? _mm256_srli_epi16(packed, 4) : packed, _mm256_set1_epi8(15));
  if constexpr (kPlanes > 0) half.signs = _mm256_slli_epi16(load(chunk + kIndexBytes), kUp);
  if constexpr (kPlanes > 1) half.uppers = _mm256_slli_epi16(load(chunk + kIndexBytes + kPlaneBytes), kUp);
  return half;
}

// Gains of a unit, and +d or -d.
template <bool kWide>
class Digits {
 public:
  explicit Digits(const PreparedCode& code)
      : gains_(code.gains), count_(code.gain_count), shift_(_mm256_set1_ps(static_cast<float>(code.shift))) {
    alignas(32) float padded[16] = {};
    for (int i = 0; i < 16 && i < count_; ++i) padded[i] = gains_[i];
    first_ = _mm256_load_ps(padded);
    next_ = _mm256_load_ps(padded + 8);
  }

  static constexpr int kBytes = kWide ? 8 : 4;

  void read(const uint8_t* digits, __m256& gain, __m256& shift) const {
    __m256i digit, coset;
    if constexpr (kWide) {
      digit = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(digits)));
      coset = _mm256_slli_epi32(digit, 24);
    } else {
      int packed;
      memcpy(&packed, digits, 4);
      digit = _mm256_srlv_epi32(_mm256_set1_epi32(packed), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
      coset = _mm256_slli_epi32(digit, 28);
    }
    gain = gains_at(digit);
    shift = _mm256_xor_ps(shift_, _mm256_and_ps(_mm256_castsi256_ps(coset), _mm256_set1_ps(-0.0f)));
  }

 private:
  __m256 gains_at(__m256i digit) const {
    const __m256 first = _mm256_permutevar8x32_ps(first_, digit);
    if (!kWide) return first;
    if (count_ > 16) return _mm256_i32gather_ps(gains_, _mm256_and_si256(digit, _mm256_set1_epi32(127)), 4);
    const __m256 above = _mm256_castsi256_ps(_mm256_slli_epi32(digit, 28));
    return _mm256_blendv_ps(first, _mm256_permutevar8x32_ps(next_, digit), above);
  }

  const float* gains_;
  int count_;
  __m256 shift_, first_, next_;
};

inline float sum_of(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// The floats of 16 words, first the lower ones of each lane, then the upper ones.
inline __m256 lower_floats(__m256i words) { return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)); }
inline __m256 upper_floats(__m256i words) {
  return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}

inline uint8_t float_byte(uint8_t level, int shift) {
  const float value = level;
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return static_cast<uint8_t>(bits >> shift);
}

class Floats {
 public:
  explicit Floats(const PreparedCode& code)
      : uppers_(ByteTable::of(code, 128, [](uint8_t level) { return float_byte(level, 24); })),
        lowers_(ByteTable::of(code, 0, [](uint8_t level) { return float_byte(level, 16); })) {}

  // totals += one unit; place: of its first octet
  template <int R, int kPlanes>
  void add(const Half<kPlanes>& low, const Half<kPlanes>& high, __m256 gain, __m256 shift, const PreparedInputs& x,
           int64_t place, __m256* totals) const {
    const __m256i low_uppers = upper_bytes(low), low_lowers = low.look_up(lowers_);
    const __m256i high_uppers = upper_bytes(high), high_lowers = high.look_up(lowers_);
    const __m256i a = _mm256_unpacklo_epi8(low_lowers, low_uppers), b = _mm256_unpacklo_epi8(high_lowers, high_uppers);
    const __m256i c = _mm256_unpackhi_epi8(low_lowers, low_uppers), d = _mm256_unpackhi_epi8(high_lowers, high_uppers);
    const __m256 first_gain = _mm256_unpacklo_ps(gain, gain), second_gain = _mm256_unpackhi_ps(gain, gain);
    const __m256 moved = _mm256_mul_ps(gain, shift);
    for (int r = 0; r < R; ++r) {
      const int64_t here = r * x.chunks * kChunkOctets + place;
      const float* at = x.floats + 8 * here;
      __m256 first = _mm256_mul_ps(lower_floats(a), _mm256_loadu_ps(at));
      first = _mm256_fmadd_ps(upper_floats(a), _mm256_loadu_ps(at + 8), first);
      first = _mm256_fmadd_ps(lower_floats(b), _mm256_loadu_ps(at + 16), first);
      first = _mm256_fmadd_ps(upper_floats(b), _mm256_loadu_ps(at + 24), first);
      __m256 second = _mm256_mul_ps(lower_floats(c), _mm256_loadu_ps(at + 32));
      second = _mm256_fmadd_ps(upper_floats(c), _mm256_loadu_ps(at + 40), second);
      second = _mm256_fmadd_ps(lower_floats(d), _mm256_loadu_ps(at + 48), second);
      second = _mm256_fmadd_ps(upper_floats(d), _mm256_loadu_ps(at + 56), second);
      const __m256 rest = _mm256_fmadd_ps(second, second_gain, _mm256_mul_ps(moved, _mm256_loadu_ps(x.sums + here)));
      totals[r] = _mm256_add_ps(totals[r], _mm256_fmadd_ps(first, first_gain, rest));
    }
  }

 private:
  template <int kPlanes>
  __m256i upper_bytes(const Half<kPlanes>& half) const {
    const __m256i bytes = half.look_up(uppers_);
    if constexpr (kPlanes == 0) return bytes;
    return _mm256_xor_si256(bytes, _mm256_and_si256(half.signs, _mm256_set1_epi8(-128)));
  }

  ByteTable uppers_, lowers_;
};

// total + the sum of t x over four bytes, t < 128 and |x| < 128.
inline __m256i dot_bytes(__m256i total, __m256i t, __m256i x) {
#if defined(__AVX512VNNI__)
  return _mm256_dpbusd_epi32(total, t, x);
#else
  return _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_maddubs_epi16(t, x), _mm256_set1_epi16(1)));
#endif
}

class Integers {
 public:
  explicit Integers(const PreparedCode& code)
      : levels_(ByteTable::of(code, 0, [](uint8_t level) { return level; })),
        signs_(ByteTable::of(code, 0xfe, [](uint8_t) -> uint8_t { return 1; })) {}

  template <int R, int kPlanes>
  void add(const Half<kPlanes>& low, const Half<kPlanes>& high, __m256 gain, __m256 shift, const PreparedInputs& x,
           int64_t place, __m256* totals) const {
    const __m256i low_levels = low.look_up(levels_), low_signs = sign_bytes(low);
    const __m256i high_levels = high.look_up(levels_), high_signs = sign_bytes(high);
    for (int r = 0; r < R; ++r) {
      const int64_t here = r * x.chunks * kChunkOctets + place;
      const __m256i low_x = _mm256_sign_epi8(load(x.integers + 8 * here), low_signs);
      const __m256i high_x = _mm256_sign_epi8(load(x.integers + 8 * here + 32), high_signs);
      const __m256i dots = dot_bytes(dot_bytes(_mm256_setzero_si256(), low_levels, low_x), high_levels, high_x);
      const __m256 moved = _mm256_fmadd_ps(shift, _mm256_loadu_ps(x.sums + here), _mm256_cvtepi32_ps(dots));
      totals[r] = _mm256_fmadd_ps(gain, moved, totals[r]);
    }
  }

 private:
  template <int kPlanes>
  __m256i sign_bytes(const Half<kPlanes>& half) const {
    if constexpr (kPlanes == 0) return half.look_up(signs_);
    return _mm256_or_si256(half.signs, _mm256_set1_epi8(1));
  }

  ByteTable levels_, signs_;
};

constexpr int kAhead = 2048;  // bytes fetched before they are wanted

template <class Kind, int kPlanes, bool kWide, int R>
void dot_of(const PreparedCode& code, const uint8_t* chunk, int count, const PreparedInputs& x, float* sums) {
  constexpr int kDigits = kIndexBytes + kPlanes * kPlaneBytes, kUnits = kChunkOctets / kUnitOctets;
  constexpr int kBytes = kDigits + kUnits * Digits<kWide>::kBytes;
  const Kind kind(code);
  const Digits<kWide> digits(code);
  for (int o = 0; o < count; ++o) {
    __m256 totals[R];
    for (int r = 0; r < R; ++r) totals[r] = _mm256_setzero_ps();
    const auto add = [&](int64_t place, auto unit) {
      constexpr int kUnit = decltype(unit)::value;
      __m256 gain, shift;
      digits.read(chunk + kDigits + kUnit * Digits<kWide>::kBytes, gain, shift);
      kind.template add<R>(half_of<kPlanes, kUnit, false>(chunk), half_of<kPlanes, kUnit, true>(chunk), gain, shift, x,
                           place + kUnit * kUnitOctets, totals);
    };
    for (int64_t i = 0; i < x.chunks; ++i, chunk += kBytes) {
      for (int line = 0; line < kBytes; line += 64)
        _mm_prefetch(reinterpret_cast<const char*>(chunk) + kAhead + line, _MM_HINT_T0);
      add(i * kChunkOctets, std::integral_constant<int, 0>());
      add(i * kChunkOctets, std::integral_constant<int, 1>());
      add(i * kChunkOctets, std::integral_constant<int, 2>());
      add(i * kChunkOctets, std::integral_constant<int, 3>());
    }
    for (int r = 0; r < R; ++r) sums[o * R + r] = sum_of(totals[r]);
  }
}

template <class Kind, int kPlanes, bool kWide>
void dot_rows(const PreparedCode& code, const uint8_t* prepared, int count, const PreparedInputs& x, int rows,
              float* sums) {
  if (rows == 1) return dot_of<Kind, kPlanes, kWide, 1>(code, prepared, count, x, sums);
  if (rows == 2) return dot_of<Kind, kPlanes, kWide, 2>(code, prepared, count, x, sums);
  if (rows == 4) return dot_of<Kind, kPlanes, kWide, 4>(code, prepared, count, x, sums);
  return dot_of<Kind, kPlanes, kWide, 8>(code, prepared, count, x, sums);
}

template <class Kind>
void dot(const PreparedCode& code, const uint8_t* prepared, int count, const PreparedInputs& x, int rows, float* sums) {
  const bool wide = code.gain_count > 8;
  const auto dot = code.limit > 15  ? (wide ? dot_rows<Kind, 2, true> : dot_rows<Kind, 2, false>)
                   : code.limit > 7 ? (wide ? dot_rows<Kind, 1, true> : dot_rows<Kind, 1, false>)
                                    : (wide ? dot_rows<Kind, 0, true> : dot_rows<Kind, 0, false>);
  dot(code, prepared, count, x, rows, sums);
}

void dot_floats(const PreparedCode& code, const uint8_t* prepared, int count, const PreparedInputs& x, int rows,
                float* sums) {
  dot<Floats>(code, prepared, count, x, rows, sums);
}

void dot_integers(const PreparedCode& code, const uint8_t* prepared, int count, const PreparedInputs& x, int rows,
                  float* sums) {
  dot<Integers>(code, prepared, count, x, rows, sums);
}

}  // namespace
}  // namespace compress
