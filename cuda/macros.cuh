// What the compilers of the CPU and the GPU call the same thing.
#pragma once

#if !defined(COMPRESS_HD)
#if defined(__CUDACC__)
#define COMPRESS_HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define COMPRESS_HD inline
#else
#define COMPRESS_HD inline __attribute__((always_inline))
#endif
#endif
