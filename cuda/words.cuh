// Operations on 32-bit words of four bytes that a GPU has as single instructions, and the same in C++ for tests.
#pragma once

#include <cstdint>

#include "macros.cuh"

namespace compress {

// Byte i of the result is byte (selector >> 4 i) & 7 of the eight bytes of low and high; where bit 4 i + 3 of the
// selector is set, the sign of that byte fills it. The upper half of the selector does not count.
COMPRESS_HD uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
  return result;
#else
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> (4 * i) & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (nibble & 7))) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
#endif
}

COMPRESS_HD int byte_of(uint32_t word, int i) { return static_cast<int8_t>(word >> (8 * i)); }

// sum + the dot product of four signed bytes.
COMPRESS_HD int dot_bytes(uint32_t a, uint32_t b, int sum) {
#if defined(__CUDA_ARCH__)
  asm("dp4a.s32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
#else
  for (int i = 0; i < 4; ++i) sum += byte_of(a, i) * byte_of(b, i);
#endif
  return sum;
}

COMPRESS_HD float float_from(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  union {
    uint32_t bits;
    float value;
  } both{bits};
  return both.value;
#endif
}

// Reads N words (1, 2 or a multiple of 4) that are used once, from an address aligned to N of them or to 16 bytes.
template <int N>
COMPRESS_HD void stream_words(const uint8_t* from, uint32_t* words) {
#if defined(__CUDA_ARCH__)
  if constexpr (N == 1) {
    words[0] = __ldcs(reinterpret_cast<const unsigned int*>(from));
  } else if constexpr (N == 2) {
    const uint2 pair = __ldcs(reinterpret_cast<const uint2*>(from));
    words[0] = pair.x, words[1] = pair.y;
  } else {
    for (int i = 0; i < N; i += 4) {
      const uint4 four = __ldcs(reinterpret_cast<const uint4*>(from) + i / 4);
      words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
    }
  }
#else
  for (int i = 0; i < N; ++i) words[i] = reinterpret_cast<const uint32_t*>(from)[i];
#endif
}

}  // namespace compress
