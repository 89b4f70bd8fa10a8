// The loops over the classes of a block, for one instruction set: COMPRESS_INSTRUCTIONS names it, the compiler's
// options choose it. Nothing that another file might define as well is used here, inline functions of the standard
// library included: the linker could keep the copy with instructions that a machine lacks.
#include <cmath>

#include "divergence.cuh"
#include "divergence_rows.h"

#define COMPRESS_JOIN_(a, b) a##b
#define COMPRESS_JOIN(a, b) COMPRESS_JOIN_(a, b)

namespace compress {
namespace {

// Classes that are summed in float32, so that at most 16 terms meet in a lane.
#if defined(__AVX512F__)
constexpr int kRun = 256;
#elif defined(__AVX2__)
constexpr int kRun = 128;
#elif defined(_MSC_VER)
constexpr int kRun = 16;  // it makes no vectors of these loops
#else
constexpr int kRun = 64;
#endif

// An integer in the order of the floats; the function is its own inverse. A compiler may reorder a maximum of integers,
// but not one of floats, which might be no numbers. (These are the largest or smallest here, and spoil the row later.)
COMPRESS_LANE int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

COMPRESS_LANE int32_t key_of(float logit) { return ordered(static_cast<int32_t>(bits_of(logit))); }

COMPRESS_LANE float logit_of(int32_t key) { return float_of(static_cast<uint32_t>(ordered(key))); }

// The largest logits of both sides.
void find_largest(const float* student, const float* teacher, DivergenceBlock& block) {
  int32_t of_student = INT32_MIN, of_teacher = INT32_MIN;
#pragma omp simd reduction(max : of_student, of_teacher)
  for (int i = 0; i < block.count; ++i) {
    const int32_t s = key_of(student[i]), t = key_of(teacher[i]);
    of_student = s > of_student ? s : of_student;
    of_teacher = t > of_teacher ? t : of_teacher;
  }
  block.student.largest = logit_of(of_student);
  block.teacher.largest = logit_of(of_teacher);
}

// Exponentials relative to the largest logits.
void weigh(const DivergenceRow& row, DivergenceBlock& block) {
  const float* student = row.student + block.start;
  const float* teacher = row.teacher + block.start;
  float* student_weights = row.student_weights + block.start;
  float* teacher_weights = row.teacher_weights + block.start;
  const float inverse_temperature = row.inverse_temperature;
  find_largest(student, teacher, block);
  const float student_origin = block.student.largest == -INFINITY ? 0.0f : block.student.largest;  // all left out
  const float teacher_origin = block.teacher.largest == -INFINITY ? 0.0f : block.teacher.largest;
  block.student.sum = block.teacher.sum = 0.0;
  for (int start = 0; start < block.count; start += kRun) {
    const int end = start + kRun < block.count ? start + kRun : block.count;
    float student_sum = 0.0f, teacher_sum = 0.0f;
#pragma omp simd reduction(+ : student_sum, teacher_sum)
    for (int i = start; i < end; ++i) {
      student_weights[i] = exp_negative((student[i] - student_origin) * inverse_temperature);
      teacher_weights[i] = exp_negative((teacher[i] - teacher_origin) * inverse_temperature);
      student_sum += student_weights[i];
      teacher_sum += teacher_weights[i];
    }
    block.student.sum += student_sum;
    block.teacher.sum += teacher_sum;
  }
}

template <bool kWrite, class Divergence>
void compare_with(Divergence divergence, const DivergenceRow& row, DivergenceBlock& block) {
  const float* student = row.student + block.start;
  const float* teacher = row.teacher + block.start;
  const float* student_weights = row.student_weights + block.start;
  const float* teacher_weights = row.teacher_weights + block.start;
  float* gradient = kWrite ? row.gradient + block.start : nullptr;
  const float inverse_temperature = row.inverse_temperature;
  const float student_origin = row.student_origin, teacher_origin = row.teacher_origin;
  const float shift = row.shift, shift_rest = row.shift_rest;
  const float same = shift - shift;  // u of a class that both leave out: 0, unless there is a logit that is no number
  const float student_factor = static_cast<float>(block.student.factor);
  const float teacher_factor = static_cast<float>(block.teacher.factor);
  block.f = block.a = 0.0;
  for (int start = 0; start < block.count; start += kRun) {
    const int end = start + kRun < block.count ? start + kRun : block.count;
    float f = 0.0f, a = 0.0f;
#pragma omp simd reduction(+ : f, a)
    for (int i = start; i < end; ++i) {
      const float q = student_weights[i] * student_factor, p = teacher_weights[i] * teacher_factor;
      const float apart = (teacher[i] - teacher_origin) - (student[i] - student_origin);
      float u = (apart * inverse_temperature - shift) - shift_rest;
      u = select(apart == apart, u, same);
      const Term term = divergence(p, q, u);
      f += term.f;
      a += term.a;
      if (kWrite) gradient[i] = term.a;
    }
    block.f += f;
    block.a += a;
  }
}

template <class Divergence>
void compare_as(Divergence divergence, const DivergenceRow& row, DivergenceBlock& block) {
  if (row.gradient == nullptr)
    compare_with<false>(divergence, row, block);
  else
    compare_with<true>(divergence, row, block);
}

void compare(const DivergenceRow& row, DivergenceBlock& block) {
  const float w = row.option, v = row.complement;
  switch (row.kind) {
    case kForwardKL:
      return compare_as(ForwardKL{}, row, block);
    case kReverseKL:
      return compare_as(ReverseKL{}, row, block);
    case kSymmetricKL:
      return compare_as(SymmetricKL{w, v}, row, block);
    case kSkewKL:
      return compare_as(SkewKL{w, v}, row, block);
    case kReverseSkewKL:
      return compare_as(ReverseSkewKL{w, v}, row, block);
    case kJensenShannon:
      return compare_as(JensenShannon{w, v}, row, block);
    default:
      return compare_as(TotalVariation{}, row, block);
  }
}

void centre(const DivergenceRow& row, const DivergenceBlock& block, float total) {
  float* gradient = row.gradient + block.start;
  const float* weights = row.student_weights + block.start;
  const float scale = row.scale, factor = static_cast<float>(block.student.factor) * total;
#pragma omp simd
  for (int i = 0; i < block.count; ++i) gradient[i] = (gradient[i] - weights[i] * factor) * scale;
}

constexpr DivergencePasses kPasses = {weigh, compare, centre};

}  // namespace

const DivergencePasses* COMPRESS_JOIN(divergence_passes_, COMPRESS_INSTRUCTIONS)() { return &kPasses; }

}  // namespace compress
