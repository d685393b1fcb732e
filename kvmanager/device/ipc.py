"""Legacy CUDA IPC, by CuPy: the whole of one cudaMalloc, named by 64 bytes that any process may open.

Neither end needs more of the other than the handle: no descriptor, no shared IPC namespace. In return a
mapping pins the memory without being able to pass it on, and the owner may not free what is mapped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from kvmanager.device.cuda import find, load, uuid_of
from kvmanager.device.memory import (
    Allocation,
    DeviceError,
    Export,
    Exporter,
    Importer,
    Mapping,
    OutOfMemory,
    whole_units,
)
from kvmanager.layout import PoolKind

if TYPE_CHECKING:
    from types import ModuleType

# Of cudaError_t.
_OUT_OF_MEMORY: Final = 2
_INSUFFICIENT_DRIVER: Final = 35
_INVALID_CONTEXT: Final = 201
_MAP_FAILED: Final = 205


def _runtime() -> ModuleType:
    """CuPy's binding of the CUDA runtime. Raises DeviceError."""
    try:
        from cupy.cuda import runtime
    except ImportError as error:
        message = "CuPy is not installed; install Pagehold with its extra, as in `pip install 'pagehold[cuda13]'`"
        raise DeviceError(message) from error
    return runtime  # type: ignore[no-any-return]


def _ask(runtime: ModuleType, what: str, call: Callable[..., Any], *arguments: object) -> Any:
    """The one place where a runtime call's error is looked at. Raises DeviceError."""
    try:
        return call(*arguments)
    except runtime.CUDARuntimeError as error:
        if error.status == _OUT_OF_MEMORY:
            message = f"{what}: the device has not that much memory left; choose a smaller --kv-memory"
            raise OutOfMemory(message) from error
        remedy = _REMEDIES.get(error.status, "see the kernel's log (dmesg) for NVIDIA's own message")
        raise DeviceError(f"{what} failed with {error}; {remedy}") from error


_REMEDIES: Final = {
    _INSUFFICIENT_DRIVER: "install an NVIDIA driver that supports CUDA 13",
    _INVALID_CONTEXT: "start both processes in one PID namespace, or use --pool vmm",
    _MAP_FAILED: "the two containers cannot share memory by IPC; use --pool vmm",
}


class IpcAllocation(Allocation):
    """One cudaMalloc: its base is its beginning, so the offset is 0."""

    def __init__(self, runtime: ModuleType, address: int, export: Export) -> None:
        self.export = export
        self._runtime = runtime
        self._address = address

    def close(self) -> None:
        if self._address:
            _ask(self._runtime, "cudaFree", self._runtime.free, self._address)
            self._address = 0


class IpcExporter(Exporter):
    """Never from a pool of CuPy's: that would export its neighbours too."""

    def allocate(self, nbytes: int, device: bytes) -> IpcAllocation:
        runtime, nbytes = _runtime(), whole_units(nbytes)
        _ask(runtime, "cudaSetDevice", runtime.setDevice, find(load(), device))
        address = _ask(runtime, "cudaMalloc", runtime.malloc, nbytes)
        try:
            handle = bytes(_ask(runtime, "cudaIpcGetMemHandle", runtime.ipcGetMemHandle, address))
        except DeviceError:
            runtime.free(address)
            raise
        return IpcAllocation(runtime, address, Export(PoolKind.IPC, handle, 0, nbytes, device))


class IpcMapping(Mapping):
    """One cudaIpcOpenMemHandle, to be closed once."""

    def __init__(self, runtime: ModuleType, ordinal: int, base: int, export: Export) -> None:
        self.address = base + export.offset
        self.nbytes = export.nbytes - export.offset
        self._runtime = runtime
        self._ordinal = ordinal
        self._base = base

    def close(self) -> None:
        if self._base:
            _ask(self._runtime, "cudaSetDevice", self._runtime.setDevice, self._ordinal)
            _ask(self._runtime, "cudaIpcCloseMemHandle", self._runtime.ipcCloseMemHandle, self._base)
            self._base = 0


class IpcImporter(Importer):
    def device(self, ordinal: int) -> bytes:
        return uuid_of(load(), ordinal)

    def open(self, export: Export, fd: int | None) -> IpcMapping:
        runtime, ordinal = _runtime(), find(load(), export.device)
        # Opened with another device current, it would make a context there and reach over the bus.
        _ask(runtime, "cudaSetDevice", runtime.setDevice, ordinal)
        base = _ask(runtime, "cudaIpcOpenMemHandle", runtime.ipcOpenMemHandle, export.handle)
        return IpcMapping(runtime, ordinal, base, export)
