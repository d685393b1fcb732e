"""CUDA's own memory: which devices this process sees, and the two ways to hand their memory over.

Nothing of CUDA is imported before it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from kvmanager.device.memory import DeviceError, Exporter, Importer, OutOfMemory, uuid_name
from kvmanager.layout import PoolKind

if TYPE_CHECKING:
    from types import ModuleType

_INSTALL: Final = "install Pagehold with its extra, as in `pip install 'pagehold[cuda13]'`"
_NO_DRIVER: Final = "there is no NVIDIA driver here (libcuda.so.1); use a machine with one, or --device cpu"


def exporter(kind: PoolKind) -> Exporter:
    if kind is PoolKind.IPC:
        from kvmanager.device.ipc import IpcExporter

        return IpcExporter()
    from kvmanager.device.vmm import VmmExporter

    return VmmExporter()


def importer(kind: PoolKind) -> Importer:
    if kind is PoolKind.IPC:
        from kvmanager.device.ipc import IpcImporter

        return IpcImporter()
    from kvmanager.device.vmm import VmmImporter

    return VmmImporter()


def load() -> ModuleType:
    """`cuda.bindings.driver`, initialised. Raises DeviceError."""
    try:
        driver = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise DeviceError(f"cuda-bindings is not installed; {_INSTALL}") from error
    try:
        # Not only where there is no driver: also where there is none that knows these functions.
        check("cuInit", driver.cuInit(0))
    except (ImportError, OSError, RuntimeError) as error:
        raise DeviceError(_NO_DRIVER) from error
    return driver


def check(what: str, answer: tuple[Any, ...]) -> Any:
    """The one place where a driver call's status is looked at; returns what else it gave. Raises DeviceError."""
    status, *values = answer
    if int(status):
        name = getattr(status, "name", str(status))
        if name == "CUDA_ERROR_OUT_OF_MEMORY":
            raise OutOfMemory(f"{what}: the device has not that much memory left; choose a smaller --kv-memory")
        remedy = _REMEDIES.get(name, "see the kernel's log (dmesg) for NVIDIA's own message")
        raise DeviceError(f"{what} failed with {name}; {remedy}")
    return values[0] if len(values) == 1 else tuple(values)


_REMEDIES: Final = {
    "CUDA_ERROR_NO_DEVICE": "give this process a GPU, such as with `docker --gpus`, and see CUDA_VISIBLE_DEVICES",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "the driver was updated while it was loaded: restart the machine",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": "install an NVIDIA driver that supports CUDA 13",
    "CUDA_ERROR_NOT_SUPPORTED": "this device or driver cannot share memory in this way; try the other --pool",
    "CUDA_ERROR_NOT_PERMITTED": "this container may not share memory in this way; try the other --pool",
}


def find(driver: ModuleType, uuid: bytes) -> int:
    """The ordinal of the device of this uuid. Raises DeviceError when this process does not see it."""
    uuids = [uuid_of(driver, ordinal) for ordinal in range(check("cuDeviceGetCount", driver.cuDeviceGetCount()))]
    if uuid not in uuids:
        seen = ", ".join(map(uuid_name, uuids)) or "none"
        raise DeviceError(
            f"{uuid_name(uuid)} is not visible here, only {seen}; start kvmanager and executor with the same GPUs "
            "(CUDA_VISIBLE_DEVICES, `docker --gpus`)"
        )
    return uuids.index(uuid)


def uuid_of(driver: ModuleType, ordinal: int) -> bytes:
    count = check("cuDeviceGetCount", driver.cuDeviceGetCount())
    if not 0 <= ordinal < count:
        raise DeviceError(f"there is no CUDA device {ordinal}, only {count} of them; see CUDA_VISIBLE_DEVICES")
    device = check("cuDeviceGet", driver.cuDeviceGet(ordinal))
    return bytes(check("cuDeviceGetUuid", driver.cuDeviceGetUuid(device)).bytes)


@contextmanager
def primary_context(driver: ModuleType, ordinal: int) -> Iterator[None]:
    """The device's primary context, current on this thread: the one that torch and CuPy use as well."""
    device = check("cuDeviceGet", driver.cuDeviceGet(ordinal))
    context = check("cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(device))
    try:
        check("cuCtxPushCurrent", driver.cuCtxPushCurrent(context))
        try:
            yield
        finally:
            check("cuCtxPopCurrent", driver.cuCtxPopCurrent())
    finally:
        check("cuDevicePrimaryCtxRelease", driver.cuDevicePrimaryCtxRelease(device))
