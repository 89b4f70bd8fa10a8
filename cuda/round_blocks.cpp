// The loops of calibrated rounding for one instruction set: COMPRESS_INSTRUCTIONS names it, the compiler's options choose
// it. No sum depends on the width of vectors: those over a group run from its first weight to its last.
#include <cmath>
#include <cstdint>
#include <vector>

#include "round.h"

#define COMPRESS_JOIN_(a, b) a##b
#define COMPRESS_JOIN(a, b) COMPRESS_JOIN_(a, b)

namespace compress {
namespace {

// Codes of some rows' groups, what they decode to, how far that is from the target, (t - v) M and (t - v) M (t - v)^T.
struct Codes {
  std::vector<int8_t> values;
  std::vector<int64_t> gain, coset;
  std::vector<float> decoded, left, cost;

  Codes(int64_t rows, int dim)
      : values(rows * dim), gain(rows), coset(rows), decoded(rows * dim), left(rows * dim), cost(rows) {}

  void take(const Codes& other, int64_t row, int dim) {
    gain[row] = other.gain[row];
    coset[row] = other.coset[row];
    cost[row] = other.cost[row];
    for (int64_t i = row * dim; i < (row + 1) * dim; ++i) {
      values[i] = other.values[i];
      decoded[i] = other.decoded[i];
      left[i] = other.left[i];
    }
  }
};

// out[j] += sum_i row[i] matrix[i, j], i ascending.
void add_product(const float* row, const float* matrix, int64_t rows, int64_t stride, int64_t columns, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    const float factor = row[i];
    const float* line = matrix + i * stride;
    for (int64_t j = 0; j < columns; ++j) out[j] += factor * line[j];
  }
}

void judge(const RoundSpan& span, const float* scale, const float* target, const float* metric, int64_t rows, int dim,
           Codes& codes) {
  std::vector<float> error(dim);
  for (int64_t r = 0; r < rows; ++r) {
    const float container = scale[r] * span.gain_values[codes.gain[r]];
    float* left = codes.left.data() + r * dim;
    for (int i = 0; i < dim; ++i) {
      codes.decoded[r * dim + i] = container * static_cast<float>(codes.values[r * dim + i]);
      error[i] = target[r * dim + i] - codes.decoded[r * dim + i];
      left[i] = 0.0f;
    }
    add_product(error.data(), metric, dim, dim, dim, left);
    float cost = 0.0f;
    for (int i = 0; i < dim; ++i) cost += left[i] * error[i];
    codes.cost[r] = cost;
  }
}

void encode_rows(const RoundSpan& span, const float* x, const float* scale, int64_t rows, int dim, Codes& codes) {
  span.encode(*span.search, x, scale, rows, codes.values.data(), codes.gain.data(), codes.coset.data());
  for (int64_t r = 0; r < rows; ++r) {
    if (scale[r] > 0.0f) continue;
    for (int i = 0; i < dim; ++i) codes.values[r * dim + i] = span.first[i];
    codes.gain[r] = codes.coset[r] = 0;
  }
}

// The filling of a short group: nine tenths of the mean magnitude of its weights.
void fill(float* target, int width, int dim) {
  float sum = 0.0f;
  for (int i = 0; i < width; ++i) sum += std::fabs(target[i]);
  for (int i = width; i < dim; ++i) target[i] = 0.9f * (sum / static_cast<float>(width));
}

// The codes that the rows have now.
void present(const RoundSpan& span, int64_t from, int64_t rows, int64_t place, int dim, Codes& codes) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t group = (from + r) * span.groups + place;
    codes.gain[r] = span.gain[group];
    codes.coset[r] = span.coset[group];
    for (int i = 0; i < dim; ++i) codes.values[r * dim + i] = span.values[group * dim + i];
  }
}

void store(const RoundSpan& span, int64_t from, int64_t rows, int64_t place, int dim, const Codes& codes) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t group = (from + r) * span.groups + place;
    span.gain[group] = codes.gain[r];
    span.coset[group] = codes.coset[r];
    span.gains[group] = span.gain_values[codes.gain[r]];
    for (int i = 0; i < dim; ++i) span.values[group * dim + i] = codes.values[r * dim + i];
  }
}

void round_rows(const RoundSpan& span, int64_t from, int64_t rows) {
  const int dim = span.dim;
  const int64_t columns = span.columns;
  const float* scale = span.scale + from;
  std::vector<float> carried(span.carried + from * columns, span.carried + (from + rows) * columns);
  std::vector<float> target(rows * dim), x(rows * dim), error(dim);
  Codes best(rows, dim), trial(rows, dim);
  for (int64_t block = (columns + dim - 1) / dim - 1; block >= 0; --block) {
    const int64_t start = block * dim;
    const int width = static_cast<int>(columns - start < dim ? columns - start : dim);
    const float* metric = span.metrics + block * dim * dim;
    const float* inverse = span.inverses + block * dim * dim;
    for (int64_t r = 0; r < rows; ++r) {
      float* here = target.data() + r * dim;
      const float* base = span.base + (from + r) * columns + start;
      for (int i = 0; i < width; ++i) here[i] = 0.0f;
      add_product(carried.data() + r * columns + start, inverse, width, dim, width, here);
      for (int i = 0; i < width; ++i) here[i] += base[i];
      fill(here, width, dim);
    }
    encode_rows(span, target.data(), scale, rows, dim, best);
    judge(span, scale, target.data(), metric, rows, dim, best);
    for (int step = 0; step < span.steps; ++step) {
      for (int64_t i = 0; i < rows * dim; ++i) x[i] = best.decoded[i] + span.overstep * best.left[i];
      encode_rows(span, x.data(), scale, rows, dim, trial);
      judge(span, scale, target.data(), metric, rows, dim, trial);
      bool moved = false;
      for (int64_t r = 0; r < rows; ++r) {
        if (!(trial.cost[r] < best.cost[r])) continue;
        best.take(trial, r, dim);
        moved = true;
      }
      if (!moved) break;
    }
    if (span.keep) {
      present(span, from, rows, span.places[block], dim, trial);
      judge(span, scale, target.data(), metric, rows, dim, trial);
      for (int64_t r = 0; r < rows; ++r)
        if (best.cost[r] >= trial.cost[r]) best.take(trial, r, dim);
    }
    store(span, from, rows, span.places[block], dim, best);
    for (int64_t r = 0; r < rows; ++r) {
      const float* base = span.base + (from + r) * columns + start;
      float* decoded = span.decoded + (from + r) * columns + start;
      for (int i = 0; i < width; ++i) {
        decoded[i] = best.decoded[r * dim + i];
        error[i] = base[i] - decoded[i];
      }
      add_product(error.data(), span.coupling + start * columns, width, columns, start, carried.data() + r * columns);
    }
  }
}

}  // namespace

RoundRows COMPRESS_JOIN(round_rows_, COMPRESS_INSTRUCTIONS)() { return round_rows; }

}  // namespace compress
