// The loops in AVX2: included by half_pyramid_blocks.cpp. Eight octets at once: lane g holds the four low parts, or the
// four high ones, of octet g as bytes.
#pragma once

#include <immintrin.h>

namespace compress {
namespace {

int read_whole_bytes(const uint8_t* bytes, int bits, int begin, int count, int place, uint32_t* rests) {
  const __m256i shifts = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(bits));
  const __m256i mask = _mm256_set1_epi32((1 << bits) - 1);
  const __m128i up = _mm_cvtsi32_si128(place);
  int i = begin;
  for (; i + 8 <= count; i += 8, bytes += bits) {
    uint32_t packed = 0;
    if (bits == 4)
      memcpy(&packed, bytes, 4);
    else if (bits == 2)
      memcpy(&packed, bytes, 2);
    else
      packed = *bytes;
    const __m256i spread = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(packed)), shifts);
    __m256i* out = reinterpret_cast<__m256i*>(rests + i);
    const __m256i part = _mm256_sll_epi32(_mm256_and_si256(spread, mask), up);
    _mm256_storeu_si256(out, _mm256_or_si256(_mm256_loadu_si256(out), part));
  }
  return i;
}

// Octets, gains and shifts of rests, from a table of all octets. With r = rank L + gain, rank is (2 r + 1) / (2 L) cut
// off, in float32. Where 2 ranks L < 2^22 that is exact (`kShort`, which also has at most eight gains). Elsewhere, for
// ranks up to 2^20 and rests below 2^30, the quotient is taken a little too small, and at most one is missing.
template <bool kShort>
class LookUp {
 public:
  LookUp(const HalfCode& code, HalfTile& tile)
      : tile_(tile),
        table_(code.octets),
        gains_(code.gains),
        gain_count_(code.gain_count),
        last_(_mm256_set1_epi32(static_cast<int>(code.last_low))),
        radix_(_mm256_set1_epi32(code.gain_count)),
        down_(_mm_cvtsi32_si128(code.shift > 0)),
        up_(_mm_cvtsi32_si128(code.shift == 0)),
        inverse_(_mm256_set1_ps(0.5f / static_cast<float>(code.gain_count) * (kShort ? 1.0f : 1.0f - 0x1p-22f))),
        shift_(_mm256_set1_ps(static_cast<float>(code.shift))) {
    alignas(32) float padded[16] = {};
    for (int i = 0; i < 16 && i < code.gain_count; ++i) padded[i] = gains_[i];
    first_gains_ = _mm256_load_ps(padded);
    next_gains_ = _mm256_load_ps(padded + 8);
  }

  void operator()(int i) const {
    const __m256i one = _mm256_set1_epi32(1);
    const __m256i given = _mm256_load_si256(reinterpret_cast<const __m256i*>(tile_.rests + i));
    const __m256i rest = _mm256_min_epu32(given, last_);
    const __m256 twice = _mm256_cvtepi32_ps(_mm256_or_si256(_mm256_sll_epi32(rest, up_), one));
    __m256i rank = _mm256_cvttps_epi32(_mm256_mul_ps(twice, inverse_));
    __m256i gain = _mm256_sub_epi32(_mm256_srl_epi32(rest, down_), _mm256_mullo_epi32(rank, radix_));
    if (!kShort) {
      const __m256i missing = _mm256_cmpgt_epi32(gain, _mm256_sub_epi32(radix_, one));
      rank = _mm256_sub_epi32(rank, missing);
      gain = _mm256_sub_epi32(gain, _mm256_and_si256(missing, radix_));
    }
    look_up(_mm256_castsi256_si128(rank), tile_.octets + i);
    look_up(_mm256_extracti128_si256(rank, 1), tile_.octets + i + 4);
    _mm256_store_ps(tile_.gains + i, gains_at(gain));
    _mm256_store_ps(tile_.shifts + i, _mm256_xor_ps(shift_, _mm256_castsi256_ps(_mm256_slli_epi32(rest, 31))));
  }

 private:
  __m256 gains_at(__m256i index) const {
    const __m256 first = _mm256_permutevar8x32_ps(first_gains_, index);
    if (kShort) return first;
    if (gain_count_ > 16) return _mm256_i32gather_ps(gains_, index, 4);
    const __m256 above = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    return _mm256_blendv_ps(first, _mm256_permutevar8x32_ps(next_gains_, index), above);
  }

  // By single loads and stores: a gather, or insertions into a register, take longer.
  void look_up(__m128i ranks, uint32_t* octets) const {
    const uint64_t low = static_cast<uint64_t>(_mm_cvtsi128_si64(ranks));
    const uint64_t high = static_cast<uint64_t>(_mm_extract_epi64(ranks, 1));
    const uint32_t a = table_[static_cast<uint32_t>(low)], b = table_[low >> 32];
    const uint32_t c = table_[static_cast<uint32_t>(high)], d = table_[high >> 32];
    octets[0] = a, octets[1] = b, octets[2] = c, octets[3] = d;
  }

  HalfTile& tile_;
  const uint32_t* table_;
  const float* gains_;
  int gain_count_;
  __m256i last_, radix_;
  __m128i down_, up_;
  __m256 inverse_, shift_, first_gains_, next_gains_;
};

bool is_short(const HalfCode& code) { return code.gain_count <= 8 && code.last_low < (1u << 21); }

// Octets that are looked up before the first of them is used: a load of eight must not wait for eight stores.
constexpr int kAhead = 64;

template <class Fill, class Use>
inline void pipeline(int count, const Fill& fill, const Use& use) {
  const int head = count < kAhead ? count : kAhead;
  for (int i = 0; i < head; i += 8) fill(i);
  for (int i = head; i < count; i += 8) {
    fill(i);
    use(i - kAhead);
  }
  for (int i = count - head; i < count; i += 8) use(i);
}

// `use` of every eight octets; rests are looked up on the way.
template <class Use>
inline void for_octets(const HalfCode& code, HalfTile& tile, int count, const Use& use) {
  if (code.octets == nullptr)
    for (int i = 0; i < count; i += 8) use(i);
  else if (is_short(code))
    pipeline(count, LookUp<true>(code, tile), use);
  else
    pipeline(count, LookUp<false>(code, tile), use);
}

// Bytes of ones where the bits of eight octets, a byte each, are set: those of the low parts and of the high ones.
struct Masks {
  __m256i low, high;
};

inline Masks masks_of(const uint8_t* bytes) {
  const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3,  //
                                          4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7);
  const __m256i low_bits = _mm256_set1_epi32(0x08040201), high_bits = _mm256_set1_epi32(static_cast<int>(0x80402010));
  int64_t packed;
  memcpy(&packed, bytes, 8);
  const __m256i bits = _mm256_shuffle_epi8(_mm256_set1_epi64x(packed), spread);
  return {_mm256_cmpeq_epi8(_mm256_and_si256(bits, low_bits), low_bits),
          _mm256_cmpeq_epi8(_mm256_and_si256(bits, high_bits), high_bits)};
}

// Of eight octets: the indices of levels, and bytes of ones where a weight is negative.
struct Lanes {
  __m256i low, high, low_negative, high_negative;
};

inline Lanes lanes_of(const HalfTile& tile, int i) {
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i octets = _mm256_load_si256(reinterpret_cast<const __m256i*>(tile.octets + i));
  const Masks negative = masks_of(tile.signs + i);
  return {_mm256_and_si256(octets, nibble), _mm256_and_si256(_mm256_srli_epi32(octets, 4), nibble), negative.low,
          negative.high};
}

inline __m256i table_of(const uint8_t* bytes) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}

inline __m256i negate(__m256i v, __m256i negative) { return _mm256_sub_epi8(_mm256_xor_si256(v, negative), negative); }

// The levels of a deep pyramid have equal steps: a top adds sixteen of them.
template <bool kDeep>
void scale_of(const HalfCode& code, HalfTile& tile, int count, float row_scale, float* out) {
  const __m256i levels = table_of(code.levels);
  const __m256i rise = _mm256_set1_epi8(static_cast<char>(kDeep ? code.levels[16] - code.levels[0] : 0));
  for_octets(code, tile, count, [&](int i) {
    alignas(32) int8_t values[64];
    alignas(32) float factors[8];
    const Lanes lanes = lanes_of(tile, i);
    __m256i low = _mm256_shuffle_epi8(levels, lanes.low), high = _mm256_shuffle_epi8(levels, lanes.high);
    if constexpr (kDeep) {
      const Masks tops = masks_of(tile.tops + i);
      low = _mm256_add_epi8(low, _mm256_and_si256(tops.low, rise));
      high = _mm256_add_epi8(high, _mm256_and_si256(tops.high, rise));
    }
    low = negate(low, lanes.low_negative);
    high = negate(high, lanes.high_negative);
    const __m256i first = _mm256_unpacklo_epi32(low, high), second = _mm256_unpackhi_epi32(low, high);
    __m256i* to = reinterpret_cast<__m256i*>(values);
    _mm256_store_si256(to, _mm256_permute2x128_si256(first, second, 0x20));
    _mm256_store_si256(to + 1, _mm256_permute2x128_si256(first, second, 0x31));
    _mm256_store_ps(factors, _mm256_mul_ps(_mm256_set1_ps(row_scale), _mm256_load_ps(tile.gains + i)));
    for (int g = 0; g < 8; ++g) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values + 8 * g));
      const __m256 v = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
      const __m256 shifted = _mm256_add_ps(v, _mm256_broadcast_ss(tile.shifts + i + g));
      _mm256_storeu_ps(out + 8 * (i + g), _mm256_mul_ps(shifted, _mm256_broadcast_ss(factors + g)));
    }
  });
}

}  // namespace
}  // namespace compress
