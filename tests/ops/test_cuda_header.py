"""The per-group code is one source for CPU and GPU: it compiles under nvcc."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

KERNEL = """
#include "bits.cuh"
#include "fischer.cuh"
#include "encode.cuh"
template <int D, class Levels>
__global__ void encode(compress::Search search, const float* x, const float* scale, signed char* v, int* gain) {
  const int g = blockIdx.x * blockDim.x + threadIdx.x;
  float values[D], best, coset;
  const Levels levels(search);
  compress::encode_lanes<compress::OneLane, D>(search, levels, x + g * D, scale[g], values, best, coset);
  for (int i = 0; i < D; ++i) v[g * D + i] = static_cast<signed char>(values[i]);
  gain[g] = static_cast<int>(best + best + coset);
}
template __global__ void encode<8, compress::TableLevels<compress::OneLane, 16>>(
    compress::Search, const float*, const float*, signed char*, int*);
template __global__ void encode<16, compress::UniformLevels<compress::OneLane>>(
    compress::Search, const float*, const float*, signed char*, int*);
template <int W>
__global__ void decode(const unsigned char* packed, const uint64_t* table, int width, int pulses, signed char* y) {
  const int run = blockIdx.x * blockDim.x + threadIdx.x;
  int64_t codes[8 * W];
  compress::unpack_run(packed + run * width, 8, width, codes);
  for (int g = 0; g < 8; ++g)
    compress::fischer_unrank<W>(reinterpret_cast<uint64_t*>(codes) + g * W, table, W, 16, pulses, 127,
                                y + (run * 8 + g) * 16);
}
template __global__ void decode<1>(const unsigned char*, const uint64_t*, int, int, signed char*);
template __global__ void decode<2>(const unsigned char*, const uint64_t*, int, int, signed char*);
"""


def test_header_compiles_under_nvcc(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    folder = Path(__file__).resolve().parents[2] / "cuda"
    source = tmp_path / "kernel.cu"
    source.write_text(KERNEL)
    command = [nvcc, "-std=c++17", "-arch=sm_90", "-fmad=false", f"-I{folder}", "-cubin", str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "kernel.cubin")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "kernel.cubin").stat().st_size > 0
