// What the driver of calibrated rounding (round.cpp) and its loops (round_blocks.cpp) share. The loops are compiled once
// for each instruction set, so nothing here may be code.
#pragma once

#include <cstdint>

#include "encode.h"

namespace compress {

// A span of columns of a matrix, in blocks of one group each: from the last block to the first
//
//     t = base_b + carried_b inverse_b,   v near t in metric_b,   carried += (base_b - v) coupling_b
//
// near being found by the encoder and by steps x = v + overstep (t - v) metric_b, each encoded and taken where better.
struct RoundSpan {
  const Search* search;
  EncodeGroups encode;
  const float *base, *carried;      // [rows, columns]
  const float* scale;               // [rows]
  const float *inverses, *metrics;  // [blocks, dim, dim], zeros where the last block has no columns
  const float* coupling;            // [columns, columns]
  const int64_t* places;            // [blocks], of a block's groups among the `groups` of a row
  const float* gain_values;         // of the codec
  const int8_t* first;              // [dim], the group of rows whose scale is 0
  int64_t columns, groups;
  int dim;
  float overstep;
  int steps;
  bool keep;  // a row's present code, if it is as near
  // codes of the whole matrix, [rows, groups] with [dim] values each
  int8_t* values;
  int64_t *gain, *coset;
  float* gains;
  float* decoded;  // [rows, columns]
};

// Rounds `count` rows from row `from` on.
using RoundRows = void (*)(const RoundSpan& span, int64_t from, int64_t count);

RoundRows round_rows_base();
RoundRows round_rows_avx2();
RoundRows round_rows_avx512();

}  // namespace compress
