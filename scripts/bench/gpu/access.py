"""Device memory by address, with nothing but CuPy: what the processes that get killed do to a pool."""

from __future__ import annotations

import ctypes
import time
from abc import ABC, abstractmethod
from typing import Any, Final

_SPIN: Final = r"""
extern "C" __global__ void spin(unsigned long long* word, unsigned long long cycles) {
  const long long start = clock64();
  volatile unsigned long long* out = word;
  while ((unsigned long long)(clock64() - start) < cycles) *out = *out + 1;
}
"""
_CLOCK_RATE: Final = 13  # cudaDevAttrClockRate: the highest, in kHz, so a kernel runs rather longer than asked
_LIKELY_CLOCK: Final = 2_000_000
_FAULT: Final = r"""
extern "C" __global__ void fault(unsigned long long* word) { *word = 1; }
"""


class Access(ABC):
    """Of one process; made after it has attached or allocated."""

    @abstractmethod
    def read(self, address: int, nbytes: int) -> bytes: ...

    @abstractmethod
    def write(self, address: int, data: bytes) -> None: ...

    @abstractmethod
    def spin(self, address: int, seconds: float) -> None:
        """One kernel that counts the 8-byte word up for so long; returns when it is under way."""

    @abstractmethod
    def fault(self) -> None:
        """A kernel that writes where nothing is. Raises what the device says."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Of the whole device."""


class CupyAccess(Access):
    """A context of its own on the first device."""

    def __init__(self) -> None:
        import cupy

        self._cupy: Any = cupy
        self._runtime = cupy.cuda.runtime
        self._runtime.setDevice(0)

    def read(self, address: int, nbytes: int) -> bytes:
        buffer = ctypes.create_string_buffer(nbytes)
        self._runtime.memcpy(ctypes.addressof(buffer), address, nbytes, self._runtime.memcpyDeviceToHost)
        return buffer.raw

    def write(self, address: int, data: bytes) -> None:
        buffer = ctypes.create_string_buffer(data, len(data))
        self._runtime.memcpy(address, ctypes.addressof(buffer), len(data), self._runtime.memcpyHostToDevice)
        self._runtime.deviceSynchronize()

    def spin(self, address: int, seconds: float) -> None:
        import numpy as np

        kilohertz = self._runtime.deviceGetAttribute(_CLOCK_RATE, 0) or _LIKELY_CLOCK
        kernel = self._cupy.RawKernel(_SPIN, "spin")
        # Made before the launch: page-locked memory and streams may wait for kernels that run.
        stream, host = self._cupy.cuda.Stream(non_blocking=True), self._cupy.cuda.alloc_pinned_memory(8)
        before, end = self.read(address, 8), time.monotonic() + seconds
        kernel((1,), (1,), (np.uint64(address), np.uint64(seconds * kilohertz * 1000)))
        word = before
        while word == before and time.monotonic() < end:
            self._runtime.memcpyAsync(host.ptr, address, 8, self._runtime.memcpyDeviceToHost, stream.ptr)
            stream.synchronize()
            word = ctypes.string_at(host.ptr, 8)

    def fault(self) -> None:
        import numpy as np

        self._cupy.RawKernel(_FAULT, "fault")((1,), (1,), (np.uint64(8),))
        self._runtime.deviceSynchronize()

    def free_bytes(self) -> int:
        return int(self._runtime.memGetInfo()[0])


class HostAccess(Access):
    """For the stand-in's memory, which has host addresses."""

    def read(self, address: int, nbytes: int) -> bytes:
        return ctypes.string_at(address, nbytes)

    def write(self, address: int, data: bytes) -> None:
        ctypes.memmove(address, data, len(data))

    def spin(self, address: int, seconds: float) -> None:
        import threading

        word, end = ctypes.c_uint64.from_address(address), time.monotonic() + seconds

        def count() -> None:
            while time.monotonic() < end:
                word.value += 1

        threading.Thread(target=count, daemon=True).start()

    def fault(self) -> None:
        raise OSError("an illegal access")

    def free_bytes(self) -> int:
        return 0


def access(host: bool) -> Access:
    return HostAccess() if host else CupyAccess()
