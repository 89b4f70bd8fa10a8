// Prepared rows of half-integer pyramids (half_prepared.h), made of their payload. Rows are spread over threads.
#include <cstring>

#include "api.h"
#include "half_groups.h"
#include "half_prepared.h"

namespace compress {
namespace {

int64_t chunks_of(int64_t octets) { return (octets + kChunkOctets - 1) / kChunkOctets; }

// Bytes of the lower and of the upper four bits, each 0 or 1.
uint32_t lower_bytes(uint32_t bits) { return (bits & 15) * 0x00204081u & 0x01010101u; }
uint32_t upper_bytes(uint32_t bits) { return (bits >> 4) * 0x00204081u & 0x01010101u; }

class Preparation {
 public:
  Preparation(const HalfCode& code, const uint8_t* const* planes, int64_t columns, int instructions)
      : code_(code),
        planes_(planes),
        octets_((columns + code.dim - 1) / code.dim * (code.dim / 8)),
        loops_(half_loops_of(instructions)),
        layout_(chunk_layout(code.limit, code.gain_count)) {
    const int cosets = code.shift > 0 ? 2 : 1;
    for (int digit = 0; digit < code.gain_count * cosets; ++digit)
      digits_[digit] = digit_of(digit / cosets, digit % cosets);
  }

  int64_t row_bytes() const { return chunks_of(octets_) * layout_.bytes; }

  // Returns whether all rests of the row are the shape's.
  bool prepare(int64_t row, uint8_t* out) const {
    memset(out, 0, row_bytes());
    bool known = true;
    for (int64_t first = 0; first < octets_; first += kTileOctets) {
      Tile tile;
      const int count = static_cast<int>(octets_ - first < kTileOctets ? octets_ - first : kTileOctets);
      const int64_t place = row * octets_ + first;
      known &= code_.octets ? look_up(place, count, tile) : unrank(place, count, tile);
      for (int i = 0; i < count; ++i)
        store(out + (first + i) / kChunkOctets * layout_.bytes, static_cast<int>((first + i) % kChunkOctets),
              planes_[0][place + i], tile, i);
    }
    return known;
  }

 private:
  struct Tile {
    uint32_t rests[kTileOctets], octets[kTileOctets];
    uint8_t tops[kTileOctets], digits[kTileOctets];
  };

  uint8_t digit_of(int gain, int coset) const {
    return static_cast<uint8_t>(gain | coset << (code_.gain_count > 8 ? 7 : 3));
  }

  bool look_up(int64_t first, int count, Tile& tile) const {
    const uint32_t last = static_cast<uint32_t>(code_.last_low);
    const uint32_t radix = static_cast<uint32_t>(code_.gain_count) * (code_.shift > 0 ? 2 : 1);
    loops_.read(planes_ + 1, code_.bits, first, count, tile.rests);
    for (int i = 0; i < count; ++i) {
      const uint32_t rest = tile.rests[i] < last ? tile.rests[i] : last, rank = rest / radix;
      tile.octets[i] = code_.octets[rank];
      tile.digits[i] = digits_[rest - rank * radix];
    }
    return loops_.largest(tile.rests, count) <= last;
  }

  bool unrank(int64_t first, int count, Tile& tile) const {
    return for_shape(code_, [&](auto dim, auto deep) { return unrank<dim(), deep()>(first, count, tile); });
  }

  template <int D, bool kDeep>
  bool unrank(int64_t first, int count, Tile& tile) const {
    constexpr int kOctets = D / 8;
    bool known = true;
    for (int i = 0; i < count; i += kOctets) {
      int gain, coset;
      const int64_t group = (first + i) / kOctets;
      known &= read_group<D, kDeep>(code_, planes_ + 1, group, tile.octets + i, tile.tops + i, gain, coset);
      memset(tile.digits + i, digit_of(gain, coset), kOctets);
    }
    return known;
  }

  void store(uint8_t* chunk, int octet, uint32_t signs, const Tile& tile, int i) const {
    const int unit = octet / kUnitOctets, within = 4 * (octet % kUnitOctets);
    uint32_t indices = tile.octets[i];
    if (code_.limit > 7)
      join(chunk + kIndexBytes + within, (lower_bytes(signs) | upper_bytes(signs) << 1) << 2 * unit);
    else
      indices |= lower_bytes(signs) << 3 | upper_bytes(signs) << 7;
    join(chunk + 4 * octet, indices);
    if (code_.limit > kMostNibble)
      join(chunk + layout_.uppers + within, (lower_bytes(tile.tops[i]) | upper_bytes(tile.tops[i]) << 1) << 2 * unit);
    if (code_.gain_count > 8)
      chunk[layout_.digits + octet] = tile.digits[i];
    else
      chunk[layout_.digits + octet / 2] |= static_cast<uint8_t>(tile.digits[i] << 4 * (octet & 1));
  }

  static void join(uint8_t* bytes, uint32_t more) {
    uint32_t word;
    memcpy(&word, bytes, 4);
    word |= more;
    memcpy(bytes, &word, 4);
  }

  const HalfCode& code_;
  const uint8_t* const* planes_;
  const int64_t octets_;
  const HalfLoops& loops_;
  const ChunkLayout layout_;
  uint8_t digits_[256];
};

}  // namespace
}  // namespace compress

// The prepared rows [rows, row bytes] of a payload. Returns the number of rows with a rest that the shape lacks.
COMPRESS_API int64_t compress_half_prepare(const compress::HalfCode* code, const uint8_t* const* planes, int64_t rows,
                                           int64_t columns, uint8_t* out, int instructions, int threads) {
  (void)threads;
  const compress::Preparation preparation(*code, planes, columns, instructions);
  int64_t refused = 0;
#pragma omp parallel for schedule(static) reduction(+ : refused) num_threads(threads)
  for (int64_t r = 0; r < rows; ++r) refused += !preparation.prepare(r, out + r * preparation.row_bytes());
  return refused;
}
