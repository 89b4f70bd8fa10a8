// Little-endian bit streams of numbers of any width, each held in ceil(width / 64) words, least significant first.
// Eight numbers fill `width` bytes exactly, so a run of eight is the unit of parallel work: runs never share a byte.
#pragma once

#include <cstdint>

#include "macros.cuh"

namespace compress {

COMPRESS_HD uint64_t low_bits(int count) { return count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

// Writes `count` (at most 8) numbers to out[0 .. ceil(count * width / 8)).
COMPRESS_HD void pack_run(const int64_t* values, int count, int width, uint8_t* out) {
  uint64_t pending = 0;
  int held = 0;
  for (int g = 0; g < count; ++g) {
    for (int left = width; left > 0; left -= 64) {
      const int here = left < 64 ? left : 64;
      const uint64_t value = static_cast<uint64_t>(*values++) & low_bits(here);
      pending |= value << held;
      const int taken = 64 - held < here ? 64 - held : here;
      held += taken;
      for (; held >= 8; held -= 8, pending >>= 8) *out++ = static_cast<uint8_t>(pending);
      if (taken < here) {
        pending |= (value >> taken) << held;
        held += here - taken;
        for (; held >= 8; held -= 8, pending >>= 8) *out++ = static_cast<uint8_t>(pending);
      }
    }
  }
  if (held > 0) *out = static_cast<uint8_t>(pending);
}

// Reads `count` (at most 8) numbers from in[0 .. ceil(count * width / 8)).
COMPRESS_HD void unpack_run(const uint8_t* in, int count, int width, int64_t* values) {
  int64_t position = 0;
  for (int g = 0; g < count; ++g) {
    for (int left = width; left > 0; left -= 64) {
      const int wanted = left < 64 ? left : 64;
      uint64_t value = 0;
      for (int done = 0; done < wanted;) {
        const int offset = position & 7;
        const int here = 8 - offset < wanted - done ? 8 - offset : wanted - done;
        value |= (static_cast<uint64_t>(in[position >> 3]) >> offset & low_bits(here)) << done;
        done += here;
        position += here;
      }
      *values++ = static_cast<int64_t>(value);
    }
  }
}

}  // namespace compress
