"""Kernels on the processor: the CUDA sources compiled as C++ behind `emulated_gpu.h`, launched as CuPy would."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compress.ops.cuda.compile import Argument, Kernel, Limits, source_folder, translation_unit

SHARED_BYTES = 227 * 1024


class EmulatedLauncher:
    """A launcher for tensors on the CPU; binaries go to `folder`."""

    def __init__(self, folder: Path, processors: int = 3, shared_bytes: int = SHARED_BYTES) -> None:
        self.folder, self._limits = folder, Limits(processors, shared_bytes)
        self.launched: list[Kernel] = []
        self._libraries: dict[Kernel, ctypes.CDLL] = {}
        for path in source_folder().glob("*.cuh"):
            shutil.copy(path, folder)
        shutil.copy(Path(__file__).with_name("emulated_gpu.h"), folder / "gpu.cuh")

    def limits(self, device: torch.device) -> Limits:
        return self._limits

    def launch(
        self,
        kernel: Kernel,
        device: torch.device,
        grid: int,
        block: int,
        shared_bytes: int,
        arguments: Sequence[Argument],
    ) -> None:
        assert shared_bytes <= self._limits.shared_bytes and block <= 1024
        assert all(not isinstance(v, Tensor) or v.is_contiguous() for v in arguments)
        values = [np.uint64(v.data_ptr()) if isinstance(v, Tensor) else v for v in arguments]
        boxes = [np.array([v]) for v in values]
        pointers = (ctypes.c_void_p * len(boxes))(*(box.ctypes.data for box in boxes))
        if kernel not in self._libraries:
            self._libraries[kernel] = self._compile(kernel)
        self._libraries[kernel].launch(pointers, grid, block)
        self.launched.append(kernel)

    def _compile(self, kernel: Kernel) -> ctypes.CDLL:
        source = translation_unit(kernel).replace("extern __shared__", "//")
        source = f'#include "gpu.cuh"\n{source}\nextern "C" void launch(void** arguments, int grid, int block) {{\n'
        source += f"  emulation::launch({kernel.name}, arguments, grid, block);\n}}\n"
        name = hashlib.sha256(source.encode()).hexdigest()[:16]
        path, library = self.folder / f"{name}.cpp", self.folder / f"{name}.so"
        path.write_text(source)
        command = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-w", "-shared", "-fPIC"]
        done = subprocess.run([*command, str(path), "-o", str(library)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(library))
