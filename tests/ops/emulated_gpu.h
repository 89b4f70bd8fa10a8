// Stands in for cuda/gpu.cuh and the compiler's own names, so that whole kernels run on a processor: every thread of a
// block is a fiber, a barrier is where fibers change, and the operations of a warp go through a barrier of its own.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct Three {
  int x, y, z;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
using std::max;
using std::min;

inline thread_local Three threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int kStack = 1 << 17;

struct Barrier {
  int waiting = 0, generation = 0;
};

struct Block {
  std::vector<ucontext_t> fibers;
  std::vector<char> stacks;
  std::vector<bool> done;
  ucontext_t main;
  Barrier all, warps[32];
  float values[32][32];
  int current = 0;
};

inline Block block;

inline void leave(int next) {
  const int from = block.current;
  block.current = next;
  threadIdx.x = next;
  swapcontext(&block.fibers[from], &block.fibers[next]);
}

// To the next thread that has not ended.
inline void yield() {
  const int count = blockDim.x;
  int next = (block.current + 1) % count;
  while (block.done[next]) next = (next + 1) % count;
  if (next != block.current) leave(next);
}

inline void wait(Barrier& barrier, int count) {
  const int generation = barrier.generation;
  if (++barrier.waiting == count) {
    barrier.waiting = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) yield();
}

inline void wait_warp() { wait(block.warps[threadIdx.x / 32], 32); }

template <class Body>
void run_block(Body& body, int threads) {
  block.fibers.resize(threads);
  block.stacks.resize(static_cast<size_t>(threads) * kStack);
  block.done.assign(threads, false);
  static Body* running;
  running = &body;
  struct Entry {
    static void enter() {
      (*running)();
      block.done[block.current] = true;
      for (int next = 0; next < blockDim.x; ++next)
        if (!block.done[next]) {
          block.current = next;
          threadIdx.x = next;
          setcontext(&block.fibers[next]);
        }
      setcontext(&block.main);
    }
  };
  for (int i = 0; i < threads; ++i) {
    getcontext(&block.fibers[i]);
    block.fibers[i].uc_stack.ss_sp = block.stacks.data() + static_cast<size_t>(i) * kStack;
    block.fibers[i].uc_stack.ss_size = kStack;
    block.fibers[i].uc_link = nullptr;
    makecontext(&block.fibers[i], Entry::enter, 0);
  }
  block.current = 0;
  threadIdx = {0, 0, 0};
  swapcontext(&block.main, &block.fibers[0]);
}

template <class... Arguments, size_t... I>
void launch(void (*kernel)(Arguments...), void** arguments, int grid, int threads, std::index_sequence<I...>) {
  gridDim = {grid, 1, 1};
  blockDim = {threads, 1, 1};
  for (int b = 0; b < grid; ++b) {
    blockIdx = {b, 0, 0};
    auto body = [&] { kernel(*static_cast<std::remove_reference_t<Arguments>*>(arguments[I])...); };
    run_block(body, threads);
  }
}

template <class... Arguments>
void launch(void (*kernel)(Arguments...), void** arguments, int grid, int threads) {
  launch(kernel, arguments, grid, threads, std::index_sequence_for<Arguments...>{});
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::block.all, blockDim.x); }
inline void __syncwarp() { emulation::wait_warp(); }
inline float __shfl_xor_sync(unsigned, float value, int distance) {
  auto& values = emulation::block.values[threadIdx.x / 32];
  values[threadIdx.x % 32] = value;
  emulation::wait_warp();
  const float other = values[threadIdx.x % 32 ^ distance];
  emulation::wait_warp();
  return other;
}

template <class To, class From>
To bits_as(From from) {
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(uint32_t bits) { return bits_as<float>(bits); }
inline float __int_as_float(int bits) { return bits_as<float>(bits); }
inline uint32_t __float_as_uint(float number) { return bits_as<uint32_t>(number); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __float2int_rn(float number) {  // saturates, as the GPU's does
  return number > 1e9f ? 1000000000 : number < -1e9f ? -1000000000 : static_cast<int>(std::nearbyint(number));
}
inline void __stcs(uint4* to, uint4 from) { *to = from; }

namespace compress {

constexpr int kWarp = 32;

struct Float32 {
  using Bits = float;
  static float number(float bits) { return bits; }
  static float bits(float number) { return number; }
};
struct Float16 {
  using Bits = uint16_t;
  static float number(uint16_t bits) { return static_cast<float>(bits_as<_Float16>(bits)); }
  static uint16_t bits(float number) { return bits_as<uint16_t>(static_cast<_Float16>(number)); }
};
struct BFloat16 {
  using Bits = uint16_t;
  static float number(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
  static uint16_t bits(float number) {
    const uint32_t whole = __float_as_uint(number);
    if (number != number) return 0x7fff;
    return static_cast<uint16_t>((whole + 0x7fff + (whole >> 16 & 1)) >> 16);
  }
};

template <int kType>
struct TypeOf;
template <>
struct TypeOf<0> {
  using Type = Float32;
};
template <>
struct TypeOf<1> {
  using Type = Float16;
};
template <>
struct TypeOf<2> {
  using Type = BFloat16;
};

template <class Operation>
uint32_t pairwise(uint32_t a, uint32_t b, Operation operation) {
  uint32_t result = 0;
  for (int i = 0; i < 32; i += 16)
    result |= static_cast<uint32_t>(Float16::bits(operation(Float16::number(static_cast<uint16_t>(a >> i)),
                                                            Float16::number(static_cast<uint16_t>(b >> i)))))
              << i;
  return result;
}
inline uint32_t subtract_pairs(uint32_t a, uint32_t b) {
  return pairwise(a, b, [](float x, float y) { return x - y; });
}
inline uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  return pairwise(a, b, [](float x, float y) { return x * y; });
}
inline uint32_t fuse_pairs(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int i = 0; i < 32; i += 16) {
    const double x = Float16::number(static_cast<uint16_t>(a >> i)), y = Float16::number(static_cast<uint16_t>(b >> i));
    const double sum = x * y + Float16::number(static_cast<uint16_t>(c >> i));
    result |= static_cast<uint32_t>(bits_as<uint16_t>(static_cast<_Float16>(sum))) << i;
  }
  return result;
}

inline float warp_sum(float value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}
inline float warp_largest(float value) {
  for (int distance = 16; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(~0u, value, distance);
    value = other > value || other != other ? other : value;
  }
  return value;
}

inline void start_copy(uint4* to, const uint4* from, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
}
inline void finish_copies() {}

// Matrix a by rows and b by columns, gathered from the lanes by PTX's description of mma.m16n8k16.
template <class T>
void multiply_add(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (&c)[4]) {
  static float left[32][16][16], right[32][16][8];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32_t b[2] = {b0, b1};
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 4; ++i)
      left[warp][g + i % 2 * 8][2 * t + half + i / 2 * 8] = T::number(static_cast<uint16_t>(a[i] >> 16 * half));
    for (int i = 0; i < 2; ++i)
      right[warp][2 * t + half + 8 * i][g] = T::number(static_cast<uint16_t>(b[i] >> 16 * half));
  }
  emulation::wait_warp();
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k) c[i] += left[warp][g + i / 2 * 8][k] * right[warp][k][2 * t + i % 2];
  emulation::wait_warp();
}

}  // namespace compress

alignas(16) inline uint4 memory[16384];
inline float* const row = reinterpret_cast<float*>(memory);
