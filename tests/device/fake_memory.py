"""Stands in for CUDA's memory where there is no GPU, by the rules that CUDA keeps; see `kvmanager.device.memory`.

Memory is a memfd. As legacy IPC its handle names the exporter's descriptor: a mapping outlives the exporter, but
nobody can open the memory again then. As VMM the descriptor itself goes over the leash.
A process chooses it by `--cuda-driver=tests.device.fake_memory`.
"""

from __future__ import annotations

import ctypes
import mmap
import os

from kvmanager.device.memory import (
    Allocation,
    DeviceError,
    Export,
    Exporter,
    Importer,
    Mapping,
    OutOfMemory,
    uuid_name,
    whole_units,
)
from kvmanager.layout import PoolKind

DEVICE = b"a fake device 0."
DEVICE_BYTES = 4 << 30
_HANDLE_BYTES = 64


class FakeAllocation(Allocation):
    def __init__(self, kind: PoolKind, fd: int, nbytes: int, device: bytes) -> None:
        handle = f"/proc/{os.getpid()}/fd/{fd}".encode().ljust(_HANDLE_BYTES, b"\0")
        self.export = Export(kind, handle if kind is PoolKind.IPC else b"", 0, nbytes, device)
        self._fd = fd

    @property
    def fd(self) -> int | None:
        return self._fd if self.export.kind is PoolKind.VMM else None

    def close(self) -> None:
        os.close(self._fd)


class FakeExporter(Exporter):
    """capacity: bytes that the device has."""

    def __init__(self, kind: PoolKind, capacity: int = DEVICE_BYTES) -> None:
        self._kind = kind
        self.capacity = capacity

    def allocate(self, nbytes: int, device: bytes) -> FakeAllocation:
        if device != DEVICE:
            raise DeviceError(f"{uuid_name(device)} is not visible here; see CUDA_VISIBLE_DEVICES")
        nbytes = whole_units(nbytes)
        if nbytes > self.capacity:
            raise OutOfMemory("the device has not that much memory left; choose a smaller --kv-memory")
        fd = os.memfd_create("pagehold-fake-gpu", os.MFD_CLOEXEC)
        os.ftruncate(fd, nbytes)
        return FakeAllocation(self._kind, fd, nbytes, device)

    def adopt(self, fd: int, nbytes: int, device: bytes) -> Allocation:
        if self._kind is not PoolKind.VMM:
            return super().adopt(fd, nbytes, device)
        return FakeAllocation(self._kind, fd, whole_units(nbytes), device)


class FakeMapping(Mapping):
    """Device memory that the CPU can reach at its address."""

    def __init__(self, view: mmap.mmap, offset: int) -> None:
        view.madvise(mmap.MADV_DONTFORK)
        # The address stays good without the object that it was read from, which would keep the map from closing.
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(view)) + offset
        self.nbytes = len(view) - offset
        self._view = view

    def close(self) -> None:
        self._view.close()


class FakeImporter(Importer):
    def device(self, ordinal: int) -> bytes:
        if ordinal:
            raise DeviceError(f"there is no CUDA device {ordinal}, only 1 of them; see CUDA_VISIBLE_DEVICES")
        return DEVICE

    def open(self, export: Export, fd: int | None) -> FakeMapping:
        if export.kind is PoolKind.VMM:
            if fd is None:
                raise DeviceError("the pool's descriptor did not come over leash.sock; start the executor again")
            return FakeMapping(mmap.mmap(fd, export.nbytes), export.offset)
        try:
            opened = os.open(export.handle.rstrip(b"\0"), os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise DeviceError(f"cudaIpcOpenMemHandle failed with {error.strerror}; start kvmanager again") from error
        try:
            return FakeMapping(mmap.mmap(opened, export.nbytes), export.offset)
        finally:
            os.close(opened)


def exporter(kind: PoolKind) -> Exporter:
    return FakeExporter(kind)


def importer(kind: PoolKind) -> Importer:
    return FakeImporter()


def view_of(mapping: Mapping) -> memoryview:
    """Its bytes, as a device's kernels would see them; not to be used after `close`."""
    return memoryview((ctypes.c_ubyte * mapping.nbytes).from_address(mapping.address)).cast("B")
