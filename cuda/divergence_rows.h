// What the driver of the divergences (divergence_rows.cpp) and their loops (divergence_blocks.cpp) share. The loops are
// compiled once for each instruction set, so nothing here may be code: the linker would keep one copy of it for all.
#pragma once

#include <cstdint>

namespace compress {

// The numbers that compress/ops/native.py gives.
enum DivergenceKind : int {
  kForwardKL,
  kReverseKL,
  kSymmetricKL,
  kSkewKL,
  kReverseSkewKL,
  kJensenShannon,
  kTotalVariation,
  kDivergenceKinds
};

// One row of logits. Weights are exponentials relative to the largest logit of their block.
struct DivergenceRow {
  const float* student;
  const float* teacher;
  float* gradient;  // null when it is not wanted; may be the student's logits
  float* student_weights;
  float* teacher_weights;
  DivergenceKind kind;
  float option, complement;  // the divergence's parameter w, and 1 - w
  float inverse_temperature;
  // log p - log q = ((teacher - teacher_origin) - (student - student_origin)) / T - (shift + shift_rest)
  float student_origin, teacher_origin;
  float shift, shift_rest;
  float scale;  // of the gradient
};

// What one of the two models makes of a block.
struct DivergenceSide {
  float largest;  // logit
  double sum;     // of the weights
  double factor;  // from a weight to a probability
};

// Some hundred classes of a row.
struct DivergenceBlock {
  int64_t start;
  int count;
  DivergenceSide student, teacher;
  double f, a;  // sums
};

// The three passes over a block.
struct DivergencePasses {
  void (*weigh)(const DivergenceRow& row, DivergenceBlock& block);    // weights and their sums
  void (*compare)(const DivergenceRow& row, DivergenceBlock& block);  // f and a, and stores a
  void (*centre)(const DivergenceRow& row, const DivergenceBlock& block, float total);  // scale (a - q total)
};

const DivergencePasses* divergence_passes_base();
const DivergencePasses* divergence_passes_avx2();
const DivergencePasses* divergence_passes_avx512();

}  // namespace compress
