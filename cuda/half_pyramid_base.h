// The loops in plain C++, for every processor: included by half_pyramid_blocks.cpp.
#pragma once

namespace compress {
namespace {

int read_whole_bytes(const uint8_t*, int, int begin, int, int, uint32_t*) { return begin; }

void look_up(const HalfCode& code, HalfTile& tile, int count) {
  if (code.octets == nullptr) return;
  const uint32_t last = static_cast<uint32_t>(code.last_low), gains = static_cast<uint32_t>(code.gain_count);
  const float shift = static_cast<float>(code.shift);
  for (int i = 0; i < count; ++i) {
    uint32_t rest = tile.rests[i] < last ? tile.rests[i] : last;
    tile.shifts[i] = shift;
    if (code.shift > 0) {
      if (rest & 1) tile.shifts[i] = -shift;
      rest >>= 1;
    }
    const uint32_t rank = rest / gains;
    tile.gains[i] = code.gains[rest - rank * gains];
    tile.octets[i] = code.octets[rank];
  }
}

// The eight numbers s_j t[m_j] of octet i.
template <bool kDeep>
inline void signed_levels(const uint8_t* levels, const HalfTile& tile, int i, int8_t* out) {
  const uint32_t octet = tile.octets[i];
  const int signs = tile.signs[i], tops = kDeep ? tile.tops[i] : 0;
  for (int j = 0; j < 8; ++j) {
    const int nibble = octet >> (j < 4 ? 8 * j : 8 * j - 28) & 15;
    const int level = levels[kDeep ? nibble | (tops >> j & 1) << 4 : nibble];
    out[j] = static_cast<int8_t>(signs >> j & 1 ? -level : level);
  }
}

template <bool kDeep>
void scale_of(const HalfCode& code, HalfTile& tile, int count, float row_scale, float* out) {
  look_up(code, tile, count);
  for (int i = 0; i < count; ++i) {
    int8_t v[8];
    signed_levels<kDeep>(code.levels, tile, i, v);
    const float c = row_scale * tile.gains[i];
    for (int j = 0; j < 8; ++j) out[8 * i + j] = c * (static_cast<float>(v[j]) + tile.shifts[i]);
  }
}

}  // namespace
}  // namespace compress
