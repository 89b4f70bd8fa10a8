// Little-endian bit streams of values of 1 to 64 bits. Eight values fill `width` bytes exactly, so a run of eight is
// the unit of parallel work: runs never share a byte.
#pragma once

#include <cstdint>

#include "pyramid.cuh"

namespace compress {

// Writes `count` (at most 8) values to out[0 .. ceil(count * width / 8)).
COMPRESS_HD void pack_run(const int64_t* values, int count, int width, uint8_t* out) {
  const uint64_t mask = width == 64 ? ~uint64_t{0} : (uint64_t{1} << width) - 1;
  uint64_t pending = 0;
  int held = 0;
  for (int g = 0; g < count; ++g) {
    const uint64_t value = static_cast<uint64_t>(values[g]) & mask;
    pending |= value << held;
    int taken = 64 - held < width ? 64 - held : width;
    held += taken;
    for (; held >= 8; held -= 8, pending >>= 8) *out++ = static_cast<uint8_t>(pending);
    if (taken < width) {
      pending |= (value >> taken) << held;
      held += width - taken;
      for (; held >= 8; held -= 8, pending >>= 8) *out++ = static_cast<uint8_t>(pending);
    }
  }
  if (held > 0) *out = static_cast<uint8_t>(pending);
}

// Reads `count` (at most 8) values from in[0 .. ceil(count * width / 8)).
COMPRESS_HD void unpack_run(const uint8_t* in, int count, int width, int64_t* values) {
  int position = 0;
  for (int g = 0; g < count; ++g) {
    uint64_t value = 0;
    for (int done = 0; done < width;) {
      const int offset = position & 7;
      const int here = 8 - offset < width - done ? 8 - offset : width - done;
      const uint64_t bits = (static_cast<uint64_t>(in[position >> 3]) >> offset) & ((uint64_t{1} << here) - 1);
      value |= bits << done;
      done += here;
      position += here;
    }
    values[g] = static_cast<int64_t>(value);
  }
}

}  // namespace compress
