// What the encoder's loops must know of a pyramid, made once for a call.
#pragma once

#include <cstdint>
#include <vector>

#include "encode.cuh"

namespace compress {

// A search and the tables it points to.
struct SearchTables {
  Search search;
  std::vector<float> inverse;
  float level[kLevels] = {}, rise[kLevels] = {}, cost[kLevels] = {};

  SearchTables(const float* gains, int gain_count, const int8_t* levels, int level_count, int dim, int shift,
               int pulses, int least, int most)
      : inverse(gain_count) {
    for (int j = 0; j < gain_count; ++j) inverse[j] = 1.0f / gains[j];
    const int limit = level_count - 1, anchor = limit < 4 ? limit : 4;
    const float pitch = limit > 0 ? static_cast<float>(levels[anchor] - levels[0]) / static_cast<float>(anchor) : 1.0f;
    bool uniform = true;
    for (int m = 1; m < limit; ++m) uniform &= levels[m + 1] - levels[m] == levels[1] - levels[0];
    if (level_count <= kLevels) {
      for (int m = 0; m < level_count; ++m) level[m] = levels[m];
      for (int m = 0; m < limit; ++m) {
        rise[m] = 2.0f * (level[m + 1] - level[m]);
        cost[m] = level[m + 1] * level[m + 1] - level[m] * level[m];
      }
    }
    search = {dim,
              pulses,
              limit,
              gain_count,
              static_cast<float>(shift),
              1.0f / pitch,
              static_cast<float>(levels[0]) / pitch,
              static_cast<float>(least),
              static_cast<float>(most),
              gains,
              inverse.data(),
              !uniform,
              pitch,
              static_cast<float>(levels[0]),
              level,
              rise,
              cost};
  }
};

// The codebook's first group: the last coordinates carry as much as they may.
inline void first_group(const int8_t* levels, int limit, int dim, int pulses, int shift, int8_t* values) {
  for (int i = dim - 1; i >= 0; --i) {
    const int here = pulses < limit ? pulses : limit;
    values[i] = static_cast<int8_t>(levels[here] + shift);
    pulses -= here;
  }
}

}  // namespace compress
