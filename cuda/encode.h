// What the driver of the encoder (encode.cpp) and its loops (encode_blocks.cpp) share. The loops are compiled once for
// each instruction set, so nothing here may be code.
#pragma once

#include <cstdint>

namespace compress {

struct Search;

// Groups x [groups, dim] with a scale each: values int8 [groups, dim], gain and coset.
using EncodeGroups = void (*)(const Search& search, const float* x, const float* scale, int64_t groups, int8_t* values,
                              int64_t* gain, int64_t* coset);

EncodeGroups encode_groups_base();
EncodeGroups encode_groups_avx2();
EncodeGroups encode_groups_avx512();

EncodeGroups encode_groups_of(int instructions);

}  // namespace compress
