// The shape that a kernel is compiled for: macros of compress/ops/cuda/tables.py, or, for compilers that look at a file
// alone, one of 3.25 bits.
#pragma once

#if !defined(HALF_DIM)  // a shape of 3.25 bits, for compilers that look at the file alone
#define HALF_DIM 8
#define HALF_REST 18
#define HALF_PULSES 10
#define HALF_LIMIT 6
#define HALF_GAINS 7
#define HALF_SHIFT 5
#define HALF_LOWEST 11
#define HALF_STRIDE 16
#define HALF_CODES_LOW 258832ull
#define HALF_CODES_HIGH 0ull
#define HALF_DIRECT 1
#define HALF_WHOLE 1
#define HALF_SHARED 1
#endif
