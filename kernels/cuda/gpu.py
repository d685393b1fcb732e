"""A GPU as a device: NVRTC and launches through CuPy, on the stream that torch uses.

CuPy is imported here and nowhere else among the kernels. What is known of it (14.2): `RawModule` always adds
`-ftz=true`, wants to find the headers of the CUDA runtime although no kernel includes one (torch's wheels bring
them), and its cache of cubins, whose key ignores included files, must be writable when it is imported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Final, NamedTuple

from kernels.cuda.device import SOURCES, Argument, CompilationError, Device, Grid, Kernel

OPTIONS: Final = ("-std=c++17", f"-I{SOURCES}")


class CacheError(Exception):
    """CuPy cannot write its cache of compiled kernels."""


class GpuKernel(Kernel):
    """A function of a loaded module."""

    def __init__(self, device: GpuDevice, raw: Any, threads: int, shared_bytes: int) -> None:
        # Kernels of one name share the attribute: never take from another what it asked for.
        if raw.max_dynamic_shared_size_bytes < shared_bytes:
            raw.max_dynamic_shared_size_bytes = shared_bytes
        self._device = device
        self._function = raw.kernel
        self._block = (threads, 1, 1)
        self._shared_bytes = shared_bytes

    @cached_property
    def blocks_per_multiprocessor(self) -> int:
        from cupy.cuda import driver

        blocks: int = driver.occupancyMaxActiveBlocksPerMultiprocessor(
            self._function.ptr, self._block[0], self._shared_bytes
        )
        return blocks

    def launch(self, grid: Grid, arguments: tuple[Argument, ...]) -> None:
        if 0 in grid:  # CuPy would launch one block
            return
        self._function(tuple(grid), self._block, arguments, self._shared_bytes, self._device.stream())


class GpuDevice(Device):
    """The GPU of that ordinal, in the primary context, which torch makes first.

    It becomes the calling thread's device; another thread that launches must have made it its own.
    Raises CacheError; RuntimeError of torch where there is no such device.
    """

    def __init__(self, ordinal: int = 0) -> None:
        import torch

        torch.cuda.set_device(ordinal)
        torch.cuda.synchronize()
        properties = torch.cuda.get_device_properties(ordinal)
        self.ordinal = ordinal
        self.multiprocessors = properties.multi_processor_count
        self.compute_capability = properties.major * 10 + properties.minor
        self._current_stream = torch.cuda.current_stream
        self._modules: dict[tuple[str, ...], Any] = {}
        try:
            import cupy
        except OSError as error:  # it makes the folder when it is imported
            raise _unwritable(error) from error
        cupy.cuda.Device(ordinal).use()

    def stream(self) -> Stream:
        """Torch's current stream: CuPy's own is another one for each thread, unordered with torch's work."""
        return Stream(self._current_stream(self.ordinal).cuda_stream)

    def kernel(
        self, file: str, name: str, defines: Mapping[str, int | str], threads: int, shared_bytes: int = 0
    ) -> GpuKernel:
        return GpuKernel(self, self._module(file, defines).get_function(name), threads, shared_bytes)

    def _module(self, file: str, defines: Mapping[str, int | str]) -> Any:
        import cupy

        options = compile_options(defines)
        module = self._modules.get((file, *options))
        if module is None:
            module = cupy.RawModule(code=(SOURCES / file).read_text(), backend="nvrtc", options=options)
            try:
                module.compile()
            except cupy.cuda.compiler.CompileException as error:
                raise CompilationError(f"{file} {' '.join(options)}\n{error}") from error
            except OSError as error:
                raise _unwritable(error) from error
            self._modules[file, *options] = module
        return module


class Stream(NamedTuple):
    """What CuPy asks of a stream in a launch."""

    ptr: int


def compile_options(defines: Mapping[str, int | str]) -> tuple[str, ...]:
    """NVRTC's options for these macros; one more holds the hash of the headers, for the key of CuPy's cache."""
    headers = hashlib.sha256()
    for header in sorted(SOURCES.rglob("*.cuh")):
        headers.update(header.read_bytes())
    macros = tuple(f"-D{macro}={value}" for macro, value in sorted(defines.items()))
    return (*OPTIONS, *macros, f"-DPAGEHOLD_HEADERS=0x{headers.hexdigest()[:16]}")


def _unwritable(error: OSError) -> CacheError:
    return CacheError(f"CuPy cannot write its cache of kernels ({error}): set CUPY_CACHE_DIR to a folder of this user")
