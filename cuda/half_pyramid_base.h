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

// The eight numbers s_j t[m_j].
inline void signed_levels(const uint8_t* levels, uint32_t octet, int signs, int8_t* out) {
  for (int j = 0; j < 8; ++j) {
    const int level = levels[octet >> (j < 4 ? 8 * j : 8 * j - 28) & 15];
    out[j] = static_cast<int8_t>(signs >> j & 1 ? -level : level);
  }
}

void scale(const HalfCode& code, HalfTile& tile, int count, float row_scale, float* out) {
  look_up(code, tile, count);
  for (int i = 0; i < count; ++i) {
    int8_t v[8];
    signed_levels(code.levels, tile.octets[i], tile.signs[i], v);
    const float c = row_scale * tile.gains[i];
    for (int j = 0; j < 8; ++j) out[8 * i + j] = c * (static_cast<float>(v[j]) + tile.shifts[i]);
  }
}

void arrange_floats(const float* x, int64_t octets, float* out) { memcpy(out, x, octets * 8 * sizeof *x); }
void arrange_integers(const int8_t* x, int64_t octets, int8_t* out) { memcpy(out, x, octets * 8); }

void dot_floats(const HalfCode& code, HalfTile& tile, int count, const HalfInputs& x, int64_t start, int rows,
                float* sums) {
  look_up(code, tile, count);
  for (int i = 0; i < count; ++i) {
    int8_t v[8];
    signed_levels(code.levels, tile.octets[i], tile.signs[i], v);
    for (int r = 0; r < rows; ++r) {
      const int64_t place = r * x.octets + start + i;
      float dot = tile.shifts[i] * x.sums[place];
      for (int j = 0; j < 8; ++j) dot += static_cast<float>(v[j]) * x.floats[8 * place + j];
      sums[r] += tile.gains[i] * dot;
    }
  }
}

void dot_integers(const HalfCode& code, HalfTile& tile, int count, const HalfInputs& x, int64_t start, int rows,
                  float* sums) {
  look_up(code, tile, count);
  look_up(code, tile, count);
  for (int i = 0; i < count; ++i) {
    int8_t v[8];
    signed_levels(code.levels, tile.octets[i], tile.signs[i], v);
    for (int r = 0; r < rows; ++r) {
      const int64_t place = r * x.octets + start + i;
      int dot = 0;
      for (int j = 0; j < 8; ++j) dot += v[j] * x.integers[8 * place + j];
      sums[r] += tile.gains[i] * (static_cast<float>(dot) + tile.shifts[i] * x.sums[place]);
    }
  }
}

}  // namespace
}  // namespace compress
