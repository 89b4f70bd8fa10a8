// What the drivers of half-integer pyramids share: the loops for a machine, and the parts of one group's rest.
#pragma once

#include <cstdint>
#include <type_traits>

#include "half_pyramid.cuh"
#include "half_pyramid_rows.h"

namespace compress {

const HalfLoops& half_loops_of(int instructions);

inline HalfTables tables_of(const HalfCode& code) {
  return {code.pulses,
          code.limit,
          code.stride,
          code.words,
          static_cast<const uint16_t*>(code.quads),
          code.quad_starts,
          static_cast<const uint32_t*>(code.quads)};
}

// `work` of D and of whether the pyramid is deep, both known when it is compiled.
template <class Work>
inline auto for_shape(const HalfCode& code, const Work& work) {
  const auto of_dim = [&](auto dim) {
    return code.limit > kMostNibble ? work(dim, std::true_type()) : work(dim, std::false_type());
  };
  if (code.dim == 8) return of_dim(std::integral_constant<int, 8>());
  if (code.dim == 16) return of_dim(std::integral_constant<int, 16>());
  return of_dim(std::integral_constant<int, 32>());
}

inline uint32_t last_rest(const HalfCode& code, uint32_t) { return static_cast<uint32_t>(code.last_low); }
inline uint64_t last_rest(const HalfCode& code, uint64_t) { return code.last_low; }
inline Wide last_rest(const HalfCode& code, Wide) { return {code.last_low, code.last_high}; }

// The parts of one group's rest. Returns whether there is such a rest; if not, the last one is taken.
template <int D, bool kDeep>
inline bool read_group(const HalfCode& code, const uint8_t* const* planes, int64_t group, uint32_t* octets,
                       uint8_t* tops, int& gain, int& coset) {
  auto rest = read_rest<D>(planes, code.bits, group);
  const auto last = last_rest(code, rest);
  const bool known = at_least(last, rest);
  if (!known) rest = last;
  split_rest(rest, code.gain_count, code.shift > 0, gain, coset);
  unrank_compositions<D, true, kDeep>(tables_of(code), rest, code.pulses, octets, tops);
  return known;
}

}  // namespace compress
