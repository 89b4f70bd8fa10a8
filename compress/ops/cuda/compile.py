"""CUDA C++ to functions of torch tensors: NVRTC compiles a source for the GPU at hand, CuPy loads and launches it.

A kernel is a source file, the name of its function, and macros: what a shape fixes (levels, gains, tables' sizes) is
known to the compiler. Binaries are kept in a folder under a hash of everything that goes into them: the sources with
all headers, the macros, the architecture and NVRTC's version.

CuPy's own compiler is not used, only NVRTC's interface beneath it: it flushes denormal numbers to zero, which would let
the encoder's codes differ from those of other machines, and its cache does not look into included files.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from compress.errors import CompressError, DependencyError

Argument = Tensor | np.generic
Macros = tuple[tuple[str, int], ...]

STANDARD_HEADERS = {
    "cstdint": """#pragma once
typedef signed char int8_t; typedef short int16_t; typedef int int32_t; typedef long long int64_t;
typedef unsigned char uint8_t; typedef unsigned short uint16_t; typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
""",
    "cstring": "#pragma once\n",
    "cmath": "#pragma once\n#define INFINITY __int_as_float(0x7f800000)\n",
}
"""What the sources need of headers that NVRTC does not have."""


@dataclass(frozen=True)
class Kernel:
    """A function of a source file under macros; `exact`: no multiplication is fused with an addition."""

    source: str
    name: str
    macros: Macros = ()
    exact: bool = False


@dataclass(frozen=True)
class Limits:
    """Of a GPU: multiprocessors, and the bytes of shared memory that a block can have."""

    processors: int
    shared_bytes: int


class Launcher(Protocol):
    """What runs kernels on the device of their tensors."""

    def limits(self, device: torch.device) -> Limits: ...

    def launch(
        self,
        kernel: Kernel,
        device: torch.device,
        grid: int,
        block: int,
        shared_bytes: int,
        arguments: Sequence[Argument],
    ) -> None: ...


def source_folder() -> Path:
    """The folder of CUDA sources: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[2]
    installed = package / "cuda"
    return installed if installed.is_dir() else package.parent / "cuda"


@lru_cache(maxsize=1)
def source_headers() -> dict[str, str]:
    """All headers that sources can include, by name."""
    folder = source_folder()
    found = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.cuh"))}
    return STANDARD_HEADERS | found


def translation_unit(kernel: Kernel) -> str:
    """The source behind its macros and the integers that NVRTC lacks."""
    macros = "".join(f"#define {name} {_literal(value)}\n" for name, value in kernel.macros)
    return f"{macros}#include <cstdint>\n{(source_folder() / kernel.source).read_text(encoding='utf-8')}"


def _literal(value: int) -> str:
    return str(value) if value < 2**31 else f"{value}ull"


def compile_options(kernel: Kernel, architecture: int) -> tuple[str, ...]:
    """For NVRTC; `architecture` is 90 for compute capability 9.0."""
    exact = ("--fmad=false",) if kernel.exact else ()
    return (f"--gpu-architecture=sm_{architecture}", "--std=c++17", *exact)


def compile_kernel(kernel: Kernel, architecture: int) -> bytes:
    """The binary (a cubin) of a kernel. Raises `DependencyError` without CuPy, `CompressError` with NVRTC's words."""
    nvrtc = _nvrtc()

    headers = source_headers()
    try:
        program = nvrtc.createProgram(
            translation_unit(kernel),
            kernel.source,
            [text.encode() for text in headers.values()],
            [name.encode() for name in headers],
        )
    except RuntimeError as error:  # of CuPy's search for the library
        raise DependencyError("nvidia-cuda-nvrtc", "gpu") from error
    try:
        nvrtc.compileProgram(program, list(compile_options(kernel, architecture)))
        return bytes(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError as error:
        log = str(nvrtc.getProgramLog(program)).strip()
        raise CompressError(
            f"NVRTC cannot compile {kernel.source} for sm_{architecture}: {log or error}",
            remedy="Install a version of CUDA that knows this GPU.",
        ) from error
    finally:
        nvrtc.destroyProgram(program)


def _nvrtc() -> Any:
    require_cupy()
    return importlib.import_module("cupy_backends.cuda.libs.nvrtc")


def require_cupy() -> None:
    """Raises `DependencyError` where CuPy is not installed."""
    if importlib.util.find_spec("cupy") is None:
        raise DependencyError("cupy", "gpu")


def cache_folder() -> Path:
    return Path.home() / ".cache" / "model-compress" / "kernels"


def cached_binary(kernel: Kernel, architecture: int, folder: Path) -> Path:
    """The file with the kernel's binary, compiled now unless it is there."""
    nvrtc = _nvrtc()

    parts = [str(nvrtc.getVersion()), *compile_options(kernel, architecture), translation_unit(kernel)]
    parts += [text for item in source_headers().items() for text in item]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    path = folder / f"{kernel.name}-sm_{architecture}-{digest}.cubin"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{np.random.default_rng().integers(2**63)}")
        part.write_bytes(compile_kernel(kernel, architecture))
        part.replace(path)
    return path


@dataclass(frozen=True)
class _CurrentStream:
    """torch's stream for CuPy, by the protocol of CUDA streams."""

    handle: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


class CupyLauncher:
    """Kernels by CuPy, on torch's current stream. Raises `DependencyError` where CuPy is missing."""

    def __init__(self, folder: Path | None = None) -> None:
        require_cupy()
        self.folder = folder or cache_folder()
        self._functions: dict[tuple[Kernel, int], Callable[..., None]] = {}
        self._limits: dict[int, Limits] = {}

    @cached_property
    def _cupy(self) -> Any:
        return importlib.import_module("cupy")

    def limits(self, device: torch.device) -> Limits:
        index = _index(device)
        if index not in self._limits:
            attributes = self._cupy.cuda.Device(index).attributes
            self._limits[index] = Limits(
                int(attributes["MultiProcessorCount"]), int(attributes["MaxSharedMemoryPerBlockOptin"])
            )
        return self._limits[index]

    def launch(
        self,
        kernel: Kernel,
        device: torch.device,
        grid: int,
        block: int,
        shared_bytes: int,
        arguments: Sequence[Argument],
    ) -> None:
        index = _index(device)
        values = tuple(np.uint64(v.data_ptr()) if isinstance(v, Tensor) else v for v in arguments)
        stream = _CurrentStream(torch.cuda.current_stream(index).cuda_stream)
        with self._cupy.cuda.Device(index), self._cupy.cuda.Stream.from_external(stream):
            function = self._functions.get((kernel, index)) or self._load(kernel, index)
            function((grid,), (block,), values, shared_mem=shared_bytes)

    def _load(self, kernel: Kernel, index: int) -> Callable[..., None]:
        major, minor = torch.cuda.get_device_capability(index)
        path = cached_binary(kernel, 10 * major + minor, self.folder)
        function = self._cupy.RawModule(path=str(path)).get_function(kernel.name)
        spare = self.limits(torch.device("cuda", index)).shared_bytes - int(function.attributes["shared_size_bytes"])
        function.max_dynamic_shared_size_bytes = spare
        self._functions[kernel, index] = function
        return function


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
