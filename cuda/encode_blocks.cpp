// The encoder's loops for one instruction set: COMPRESS_INSTRUCTIONS names it, the compiler's options choose it.
#include "encode.h"

#include "lanes.h"

#define COMPRESS_JOIN_(a, b) a##b
#define COMPRESS_JOIN(a, b) COMPRESS_JOIN_(a, b)

namespace compress {
namespace {

// The groups of one vector: as many as `count` of its lanes; the others repeat the last.
template <int D, class Levels>
void encode_block(const Search& search, const Levels& levels, const float* x, const float* scale, int count,
                  int8_t* values, int64_t* gain, int64_t* coset) {
  using F = Lanes::F;
  constexpr int kRoom = D > 0 ? D : 128;
  constexpr int kCount = Lanes::kCount;
  const int dim = D > 0 ? D : search.dim;
  F lanes[kRoom], found[kRoom], scales, best_gain, best_coset;
  float* flat = reinterpret_cast<float*>(lanes);
  float* flat_scales = reinterpret_cast<float*>(&scales);
  for (int g = 0; g < kCount; ++g) {
    const int from = g < count ? g : count - 1;
    flat_scales[g] = scale[from] > 0.0f ? scale[from] : 1.0f;
    for (int i = 0; i < dim; ++i) flat[i * kCount + g] = x[static_cast<int64_t>(from) * dim + i];
  }
  encode_lanes<Lanes, D>(search, levels, lanes, scales, found, best_gain, best_coset);
  const float* results = reinterpret_cast<const float*>(found);
  const float* gains = reinterpret_cast<const float*>(&best_gain);
  const float* cosets = reinterpret_cast<const float*>(&best_coset);
  for (int g = 0; g < count; ++g) {
    gain[g] = static_cast<int64_t>(gains[g]);
    coset[g] = static_cast<int64_t>(cosets[g]);
    for (int i = 0; i < dim; ++i)
      values[static_cast<int64_t>(g) * dim + i] = static_cast<int8_t>(results[i * kCount + g]);
  }
}

template <int D, class Levels>
void encode_all(const Search& search, const float* x, const float* scale, int64_t groups, int8_t* values, int64_t* gain,
                int64_t* coset) {
  const Levels levels(search);
  const int64_t dim = search.dim;
  for (int64_t g = 0; g < groups; g += Lanes::kCount) {
    const int count = static_cast<int>(groups - g < Lanes::kCount ? groups - g : Lanes::kCount);
    encode_block<D>(search, levels, x + g * dim, scale + g, count, values + g * dim, gain + g, coset + g);
  }
}

template <class Levels>
void encode_dims(const Search& search, const float* x, const float* scale, int64_t groups, int8_t* values,
                 int64_t* gain, int64_t* coset) {
  if (search.dim == 8) return encode_all<8, Levels>(search, x, scale, groups, values, gain, coset);
  if (search.dim == 16) return encode_all<16, Levels>(search, x, scale, groups, values, gain, coset);
  return encode_all<0, Levels>(search, x, scale, groups, values, gain, coset);
}

void encode_groups(const Search& search, const float* x, const float* scale, int64_t groups, int8_t* values,
                   int64_t* gain, int64_t* coset) {
  if (!search.table) return encode_dims<UniformLevels<Lanes>>(search, x, scale, groups, values, gain, coset);
  if (search.limit < 8) return encode_dims<TableLevels<Lanes, 8>>(search, x, scale, groups, values, gain, coset);
  return encode_dims<TableLevels<Lanes, 16>>(search, x, scale, groups, values, gain, coset);
}

}  // namespace

EncodeGroups COMPRESS_JOIN(encode_groups_, COMPRESS_INSTRUCTIONS)() { return encode_groups; }

}  // namespace compress
