"""CUDA's virtual memory management: physical memory named by a file descriptor, which keeps it alive.

The manager never maps it, so it needs no CUDA context; a descriptor is all that it holds. Any process
with the descriptor can map the memory, or pass it on: so it outlives its manager as long as an executor lives.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from kvmanager.device.cuda import check, find, load, primary_context, uuid_of
from kvmanager.device.memory import (
    UNIT,
    Allocation,
    DeviceError,
    Export,
    Exporter,
    Importer,
    Mapping,
    uuid_name,
    whole_units,
)
from kvmanager.layout import PoolKind

if TYPE_CHECKING:
    from types import ModuleType


class VmmAllocation(Allocation):
    """Physical memory, held by its descriptor."""

    def __init__(self, fd: int, nbytes: int, device: bytes) -> None:
        self.export = Export(PoolKind.VMM, b"", 0, nbytes, device)
        self._fd = fd

    @property
    def fd(self) -> int:
        return self._fd

    def close(self) -> None:
        """The memory goes when the last mapping and the last descriptor of any process are gone too."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class VmmExporter(Exporter):
    def allocate(self, nbytes: int, device: bytes) -> VmmAllocation:
        driver, nbytes = load(), whole_units(nbytes)
        ordinal = find(driver, device)
        _check_support(driver, ordinal, device)
        properties = _properties(driver, ordinal)
        minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        granularity = check("cuMemGetAllocationGranularity", driver.cuMemGetAllocationGranularity(properties, minimum))
        if UNIT % granularity:
            raise DeviceError(f"{uuid_name(device)} gives memory in units of {granularity} bytes; use --pool ipc")
        handle = check("cuMemCreate", driver.cuMemCreate(nbytes, properties, 0))
        try:
            fd = check(
                "cuMemExportToShareableHandle", driver.cuMemExportToShareableHandle(handle, _posix_fd(driver), 0)
            )
        finally:
            check("cuMemRelease", driver.cuMemRelease(handle))
        os.set_inheritable(fd, False)
        return VmmAllocation(int(fd), nbytes, device)

    def adopt(self, fd: int, nbytes: int, device: bytes) -> VmmAllocation:
        return VmmAllocation(fd, whole_units(nbytes), device)


class VmmMapping(Mapping):
    """A range of addresses with the memory behind it."""

    def __init__(self, driver: ModuleType, ordinal: int, address: int, export: Export) -> None:
        self.address = address + export.offset
        self.nbytes = export.nbytes - export.offset
        self._driver = driver
        self._ordinal = ordinal
        self._range = (address, export.nbytes)

    def close(self) -> None:
        address, nbytes = self._range
        if address:
            with primary_context(self._driver, self._ordinal):
                check("cuMemUnmap", self._driver.cuMemUnmap(address, nbytes))
                check("cuMemAddressFree", self._driver.cuMemAddressFree(address, nbytes))
            self._range = (0, 0)


class VmmImporter(Importer):
    def device(self, ordinal: int) -> bytes:
        return uuid_of(load(), ordinal)

    def open(self, export: Export, fd: int | None) -> VmmMapping:
        if fd is None:
            raise DeviceError("the pool's descriptor did not come over leash.sock; start the executor again")
        driver = load()
        ordinal = find(driver, export.device)
        _check_support(driver, ordinal, export.device)
        with primary_context(driver, ordinal):
            handle = check(
                "cuMemImportFromShareableHandle", driver.cuMemImportFromShareableHandle(fd, _posix_fd(driver))
            )
            try:
                address = _map(driver, ordinal, handle, export.nbytes)
            finally:
                # A mapping holds the memory by itself.
                check("cuMemRelease", driver.cuMemRelease(handle))
        return VmmMapping(driver, ordinal, address, export)


def _map(driver: ModuleType, ordinal: int, handle: Any, nbytes: int) -> int:
    """Reserves a range, maps the memory, allows reading and writing; all of it or nothing. Returns the address."""
    address = int(check("cuMemAddressReserve", driver.cuMemAddressReserve(nbytes, UNIT, 0, 0)))
    try:
        check("cuMemMap", driver.cuMemMap(address, nbytes, 0, handle, 0))
        try:
            access = driver.CUmemAccessDesc()
            access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
            access.location.id = ordinal
            access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
            check("cuMemSetAccess", driver.cuMemSetAccess(address, nbytes, [access], 1))
        except DeviceError:
            driver.cuMemUnmap(address, nbytes)
            raise
    except DeviceError:
        driver.cuMemAddressFree(address, nbytes)
        raise
    return address


def _posix_fd(driver: ModuleType) -> Any:
    return driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def _properties(driver: ModuleType, ordinal: int) -> Any:
    properties = driver.CUmemAllocationProp()
    properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = ordinal
    properties.requestedHandleTypes = _posix_fd(driver)  # fixed here: memory made without it cannot be exported
    return properties


def _check_support(driver: ModuleType, ordinal: int, device: bytes) -> None:
    handle = check("cuDeviceGet", driver.cuDeviceGet(ordinal))
    for attribute in (
        driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
        driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
    ):
        if not check("cuDeviceGetAttribute", driver.cuDeviceGetAttribute(attribute, handle)):
            raise DeviceError(f"{uuid_name(device)} cannot share memory by file descriptors; use --pool ipc")
