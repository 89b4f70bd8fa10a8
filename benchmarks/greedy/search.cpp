// The greedy pulse search for pyramid vector quantization as it is published and as audio codecs use it, in plain C++:
//
//     max over y in Z^D, sum |y_i| = K, of <x, y>^2 / <y, y>
//
// With K > D / 2 the bulk of the pulses comes from a projection, floor((K + 0.8) |x_i| / ||x||_1). Each of the rest goes
// to the coordinate j of the largest (xy + |x_j|)^2 / (yy + 2 y_j + 1), compared by cross-multiplication. Then the gain
// is the level nearest to <x, y> / <y, y>, which is the best one for this y. (With D as a constant of a template, the
// code of gcc 12 is slower by a third.)
#include <cmath>
#include <cstdint>

// y int8 [groups, dim] and the gain's index [groups] of x [groups, dim], dim at most 128.
extern "C" void greedy_encode(const float* x, const float* levels, int64_t groups, int dim, int level_count, int pulses,
                              int8_t* y, int64_t* gain) {
  float a[128], m[128];
  for (int64_t g = 0; g < groups; ++g, x += dim, y += dim) {
    float sum = 0.0f, xy = 0.0f, yy = 0.0f;
    int left = pulses;
    for (int i = 0; i < dim; ++i) {
      a[i] = std::fabs(x[i]);
      m[i] = 0.0f;
      sum += a[i];
    }
    if (pulses > dim / 2 && sum > 1e-15f) {
      const float steps = (static_cast<float>(pulses) + 0.8f) / sum;
      float placed = 0.0f;
      for (int i = 0; i < dim; ++i) {
        m[i] = std::floor(a[i] * steps);
        placed += m[i];
        xy += a[i] * m[i];
        yy += m[i] * m[i];
      }
      left -= static_cast<int>(placed);
    }
    for (; left > 0; --left) {
      float best_top = -1.0f, best_bottom = 0.0f;
      int best = 0;
      for (int i = 0; i < dim; ++i) {
        float top = xy + a[i];
        top *= top;
        const float bottom = yy + 2.0f * m[i] + 1.0f;
        if (best_bottom * top > bottom * best_top) {
          best_top = top;
          best_bottom = bottom;
          best = i;
        }
      }
      xy += a[best];
      yy += 2.0f * m[best] + 1.0f;
      m[best] += 1.0f;
    }
    int j = 0;
    while (j + 1 < level_count && 2.0f * xy > (levels[j] + levels[j + 1]) * yy) ++j;
    gain[g] = j;
    for (int i = 0; i < dim; ++i) y[i] = static_cast<int8_t>(x[i] < 0.0f ? -m[i] : m[i]);
  }
}
