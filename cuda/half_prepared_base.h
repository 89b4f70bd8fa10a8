// The loops in plain C++, for every processor: included by half_prepared_blocks.cpp.
#pragma once

namespace compress {
namespace {

void arrange_floats(const float* x, int64_t chunks, float* out) { memcpy(out, x, chunks * 256 * sizeof *x); }
void arrange_integers(const int8_t* x, int64_t chunks, int8_t* out) { memcpy(out, x, chunks * 256); }

// One octet without its gain.
struct Octet {
  int values[8];
  float gain, shift;
};

class Reader {
 public:
  explicit Reader(const PreparedCode& code) : code_(code), layout_(chunk_layout(code.limit, code.gain_count)) {}

  int chunk_bytes() const { return layout_.bytes; }

  Octet read(const uint8_t* chunk, int octet) const {
    const int unit = octet / kUnitOctets, within = 4 * (octet % kUnitOctets);
    Octet found;
    for (int j = 0; j < 8; ++j) {
      const int bit = 2 * unit + (j >> 2), byte = within + (j & 3);
      int index = chunk[32 * unit + byte] >> (j < 4 ? 0 : 4) & 15;
      bool negative = index & 8;
      if (code_.limit > 7)
        negative = chunk[kIndexBytes + byte] >> bit & 1;
      else
        index &= 7;
      if (code_.limit > 15) index |= (chunk[layout_.uppers + byte] >> bit & 1) << 4;
      const int level = code_.levels[index];
      found.values[j] = negative ? -level : level;
    }
    const bool wide = code_.gain_count > 8;
    const int digit = wide ? chunk[layout_.digits + octet] : chunk[layout_.digits + octet / 2] >> 4 * (octet & 1) & 15;
    const int coset = wide ? 128 : 8;
    found.gain = code_.gains[digit & (coset - 1)];
    found.shift = static_cast<float>(digit & coset ? -code_.shift : code_.shift);
    return found;
  }

 private:
  const PreparedCode& code_;
  const ChunkLayout layout_;
};

template <class Product>
inline void dot(const PreparedCode& code, const uint8_t* prepared, int count, const PreparedInputs& x, int rows,
                float* sums, const Product& product) {
  const Reader reader(code);
  for (int o = 0; o < count; ++o, sums += rows) {
    for (int r = 0; r < rows; ++r) sums[r] = 0.0f;
    for (int64_t chunk = 0; chunk < x.chunks; ++chunk, prepared += reader.chunk_bytes())
      for (int i = 0; i < kChunkOctets; ++i) {
        const Octet octet = reader.read(prepared, i);
        for (int r = 0; r < rows; ++r) {
          const int64_t place = (r * x.chunks + chunk) * kChunkOctets + i;
          sums[r] += octet.gain * (product(octet.values, place) + octet.shift * x.sums[place]);
        }
      }
  }
}

void dot_floats(const PreparedCode& code, const uint8_t* prepared, int count, const PreparedInputs& x, int rows,
                float* sums) {
  dot(code, prepared, count, x, rows, sums, [&](const int* values, int64_t place) {
    float sum = 0.0f;
    for (int j = 0; j < 8; ++j) sum += static_cast<float>(values[j]) * x.floats[8 * place + j];
    return sum;
  });
}

void dot_integers(const PreparedCode& code, const uint8_t* prepared, int count, const PreparedInputs& x, int rows,
                  float* sums) {
  dot(code, prepared, count, x, rows, sums, [&](const int* values, int64_t place) {
    int sum = 0;
    for (int j = 0; j < 8; ++j) sum += values[j] * x.integers[8 * place + j];
    return static_cast<float>(sum);
  });
}

}  // namespace
}  // namespace compress
