// Values and gradients of divergences, row by row: what is done once for a row, the threads, and the choice of the
// instruction set. The logits are read twice. The first pass takes exponentials relative to the largest logit of each
// block of some hundred classes, so that the largest of the row need not be known; the second compares p and q. A light
// third pass makes the gradient a - q sum a of a. Blocks are summed in float64 and in order, so a result does not
// depend on the number of threads; it does on the instruction set, in its last digits.
#include "divergence_rows.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "api.h"
#include "instructions.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace compress {
namespace {

constexpr int64_t kBlock = 512;
constexpr int64_t kLine = 16;  // floats in a cache line
// Largest logits further apart than this are taken off before the logits are compared, whose difference would lose
// digits. Of nearer ones it is left as it is: where two models are close it is exact.
constexpr double kFarApart = 32.0;
constexpr int64_t kWorthATeam = 1 << 15;  // classes of a row on which several threads gain more than they wait

int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// The best instruction set that this processor has and this library was compiled for.
Instructions best_instructions() {
#if defined(COMPRESS_WITH_AVX)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kBase;
}

const DivergencePasses& passes_of(int instructions) {
#if defined(COMPRESS_WITH_AVX)
  if (instructions == kAvx512) return *divergence_passes_avx512();
  if (instructions == kAvx2) return *divergence_passes_avx2();
#endif
  (void)instructions;
  return *divergence_passes_base();
}

struct FreeAligned {
  void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};

// What a row needs while it is worked on: two rows of weights, and its blocks.
struct Scratch {
  int64_t stride;
  std::unique_ptr<float[], FreeAligned> weights;
  std::vector<DivergenceBlock> blocks;

  // The stride is odd in lines, so that the two rows do not begin at the same place of a page.
  explicit Scratch(int64_t classes)
      : stride((((classes + kLine - 1) / kLine) | 1) * kLine),
        weights(static_cast<float*>(::operator new[](2 * stride * sizeof(float), std::align_val_t(64)))),
        blocks((classes + kBlock - 1) / kBlock) {
    int64_t start = 0;
    for (auto& block : blocks) {
      block.start = start;
      block.count = static_cast<int>(classes - start < kBlock ? classes - start : kBlock);
      start += kBlock;
    }
  }
};

// Of one side of a row.
struct Norm {
  double largest = -INFINITY, log_sum = 0.0;  // logsumexp(z / T) = largest / T + log_sum
};

// Gives each block the factor that makes probabilities of its weights.
Norm normalise(std::vector<DivergenceBlock>& blocks, DivergenceSide DivergenceBlock::*side, double inverse) {
  Norm norm;
  for (const auto& block : blocks)
    if ((block.*side).largest > norm.largest) norm.largest = (block.*side).largest;
  double sum = 0.0;
  for (auto& block : blocks) {
    DivergenceSide& here = block.*side;
    here.factor = std::exp((here.largest - norm.largest) * inverse);
    sum += here.factor * here.sum;
  }
  for (auto& block : blocks) (block.*side).factor /= sum;
  norm.log_sum = std::log(sum);
  return norm;
}

class Divergences {
 public:
  const float* student;
  const float* teacher;
  float* values;
  float* gradient;
  int64_t classes;
  DivergenceKind kind;
  double option, temperature, scale;
  const DivergencePasses& passes;

  // One row by one thread.
  void alone(int64_t index, Scratch& scratch) const {
    DivergenceRow row = start(index, scratch);
    for (auto& block : scratch.blocks) passes.weigh(row, block);
    prepare(row, scratch);
    for (auto& block : scratch.blocks) passes.compare(row, block);
    const Pull pull = finish(index, scratch);
    if (gradient != nullptr)
      for (const auto& block : scratch.blocks) centre(row, block, pull);
  }

  // One row by several threads, with the same result.
  void together(int64_t index, Scratch& scratch, int threads) const {
    (void)threads;
    DivergenceRow row = start(index, scratch);
    auto& blocks = scratch.blocks;
    const int64_t count = static_cast<int64_t>(blocks.size());
    Pull pull;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (int64_t b = 0; b < count; ++b) passes.weigh(row, blocks[b]);
#pragma omp single
      prepare(row, scratch);
#pragma omp for schedule(static)
      for (int64_t b = 0; b < count; ++b) passes.compare(row, blocks[b]);
#pragma omp single
      pull = finish(index, scratch);
      if (gradient != nullptr) {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < count; ++b) centre(row, blocks[b], pull);
      }
    }
  }

 private:
  // sum a. It is lost where both value and gradient are infinite; the gradient is then taken as 0.
  struct Pull {
    float total = 0.0f;
    bool lost = false;
  };

  DivergenceRow start(int64_t index, const Scratch& scratch) const {
    const int64_t place = index * classes;
    DivergenceRow row;
    row.student = student + place;
    row.teacher = teacher + place;
    row.gradient = gradient == nullptr ? nullptr : gradient + place;
    row.student_weights = scratch.weights.get();
    row.teacher_weights = scratch.weights.get() + scratch.stride;
    row.kind = kind;
    row.option = static_cast<float>(option);
    row.complement = static_cast<float>(1.0 - option);
    row.inverse_temperature = static_cast<float>(1.0 / temperature);
    row.student_origin = row.teacher_origin = row.shift = row.shift_rest = 0.0f;
    row.scale = static_cast<float>(scale / temperature);
    return row;
  }

  void prepare(DivergenceRow& row, Scratch& scratch) const {
    const double inverse = row.inverse_temperature;
    const Norm teacher_norm = normalise(scratch.blocks, &DivergenceBlock::teacher, inverse);
    const Norm student_norm = normalise(scratch.blocks, &DivergenceBlock::student, inverse);
    double shift = teacher_norm.log_sum - student_norm.log_sum;
    const double apart = teacher_norm.largest - student_norm.largest;
    if (std::fabs(apart) > kFarApart) {
      row.student_origin = static_cast<float>(student_norm.largest);
      row.teacher_origin = static_cast<float>(teacher_norm.largest);
    } else {
      shift += apart * inverse;
    }
    row.shift = static_cast<float>(shift);
    row.shift_rest = static_cast<float>(shift - row.shift);
  }

  Pull finish(int64_t index, const Scratch& scratch) const {
    double f = 0.0, a = 0.0;
    for (const auto& block : scratch.blocks) {
      f += block.f;
      a += block.a;
    }
    if (std::isnan(f)) a = f;
    values[index] = static_cast<float>(f * scale);
    return {static_cast<float>(a), std::isinf(f) && !std::isfinite(a)};
  }

  void centre(const DivergenceRow& row, const DivergenceBlock& block, const Pull& pull) const {
    if (pull.lost)
      std::fill_n(row.gradient + block.start, block.count, 0.0f);
    else
      passes.centre(row, block, pull.total);
  }
};

void all_rows(const Divergences& divergences, int64_t rows, int threads) {
  const bool divide = divergences.classes >= kWorthATeam;
  const int64_t alone = divide ? rows - rows % threads : rows;
  const int side_by_side = static_cast<int>(std::clamp<int64_t>(alone, 1, threads));
  std::vector<Scratch> scratch;
  for (int t = 0; t < side_by_side; ++t) scratch.emplace_back(divergences.classes);
#pragma omp parallel for schedule(dynamic) num_threads(side_by_side)
  for (int64_t r = 0; r < alone; ++r) divergences.alone(r, scratch[thread_number()]);
  for (int64_t r = alone; r < rows; ++r) divergences.together(r, scratch[0], threads);
}

}  // namespace
}  // namespace compress

// The best instruction set here: 0 base, 1 AVX2, 2 AVX-512. Those below it can be used as well.
COMPRESS_API int64_t compress_instructions() { return compress::best_instructions(); }

// Values [rows] of a divergence times `scale`, and, unless `gradient` is null, their gradients with respect to the
// student's logits. Dense rows; `gradient` may be `student`. Returns 0, or 1 when there is not enough memory.
COMPRESS_API int64_t compress_divergence_rows(const float* student, const float* teacher, int64_t rows, int64_t classes,
                                              int kind, double option, double temperature, double scale, float* values,
                                              float* gradient, int instructions, int threads) {
  const auto which = static_cast<compress::DivergenceKind>(kind);
  const auto& passes = compress::passes_of(instructions);
  try {
    compress::all_rows({student, teacher, values, gradient, classes, which, option, temperature, scale, passes}, rows,
                       threads);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
