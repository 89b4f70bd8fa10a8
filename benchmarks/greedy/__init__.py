"""The greedy pulse search that `pyramid` is compared with: by the system's C++ compiler, and by numpy.

`Greedy` compiles search.cpp, which says what is computed, into a temporary folder with `-O3 -march=native`. `by_numpy`
is the same search over all groups at once.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")


class Greedy:
    """The compiled search. Raises `RuntimeError` without a compiler."""

    def __init__(self) -> None:
        compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
        if compiler is None:
            raise RuntimeError("The greedy search needs a C++ compiler on the PATH.")
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "greedy.so"
            source = Path(__file__).with_name("search.cpp")
            subprocess.run([compiler, *FLAGS, str(source), "-o", str(library)], check=True)
            self.function = ctypes.CDLL(str(library)).greedy_encode
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        self.function.argtypes = [pointer, pointer, ctypes.c_int64, *[integer] * 3, pointer, pointer]
        self.function.restype = None

    def encode(self, x: Tensor, levels: Tensor, pulses: int) -> tuple[Tensor, Tensor]:
        """y int8 [G, D] and the index of the gain int64 [G] of x float32 [G, D], contiguous, D at most 128."""
        groups, dim = x.shape
        y, gain = torch.empty((groups, dim), dtype=torch.int8), torch.empty(groups, dtype=torch.int64)
        numbers = (groups, dim, levels.numel(), pulses)
        self.function(x.data_ptr(), levels.data_ptr(), *numbers, y.data_ptr(), gain.data_ptr())
        return y, gain


def by_numpy(
    x: NDArray[np.float32], levels: NDArray[np.float32], pulses: int
) -> tuple[NDArray[np.int8], NDArray[np.int64]]:
    """The same for arrays."""
    dim = x.shape[1]
    a = np.abs(x)
    m = np.zeros_like(a)
    if pulses > dim // 2:
        m = np.floor(a * ((pulses + np.float32(0.8)) / a.sum(1, keepdims=True)))
    xy, yy = (a * m).sum(1), (m * m).sum(1)
    left = pulses - m.sum(1).astype(np.int64)
    for step in range(int(left.max(initial=0))):
        rows = np.flatnonzero(left > step)
        merit = np.square(xy[rows, None] + a[rows]) / (yy[rows, None] + 2 * m[rows] + 1)
        best = merit.argmax(1)
        xy[rows] += a[rows, best]
        yy[rows] += 2 * m[rows, best] + 1
        m[rows, best] += 1
    gain = np.searchsorted((levels[1:] + levels[:-1]) / 2, xy / yy)
    return np.copysign(m, x).astype(np.int8), gain
