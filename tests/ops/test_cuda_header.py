"""The per-group code is one source for CPU and GPU: it compiles under nvcc."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

KERNEL = """
#include "bits.cuh"
__global__ void encode(const float* x, const float* scale, const float* levels, const float* inverse, int count,
                       int pulses, int limit, signed char* y, int* gain) {
  const int g = blockIdx.x * blockDim.x + threadIdx.x;
  gain[g] = compress::encode_group<16>(x + g * 16, 16, scale[g], levels, inverse, count, pulses, limit, y + g * 16);
}
__global__ void decode(const unsigned char* packed, const int64_t* words, int width, int pulses, signed char* y) {
  const int run = blockIdx.x * blockDim.x + threadIdx.x;
  int64_t codes[8];
  compress::unpack_run(packed + run * width, 8, width, codes);
  for (int g = 0; g < 8; ++g) compress::unrank_group(codes[g], words, 16, pulses, y + (run * 8 + g) * 16);
}
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
