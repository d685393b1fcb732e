"""The real exporters and importers against stand-ins for CuPy and cuda-bindings that note every call.

What the calls do on a GPU is seen on a GPU only; here it is their order, their arguments, what is undone when
one fails, and what is said then.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from types import ModuleType, SimpleNamespace

import pytest

from kvmanager.device import cuda
from kvmanager.device.memory import UNIT, DeviceError, Export, OutOfMemory, load_driver
from kvmanager.layout import PoolKind

ZERO, ONE = b"device\0zero.....", b"device\0one......"


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_SUPPORTED = 801


class CUDARuntimeError(RuntimeError):
    def __init__(self, status: int) -> None:
        super().__init__(f"cudaError {status}")
        self.status = status


@dataclass
class Calls:
    """What was called, and what is to fail."""

    made: list[str] = field(default_factory=list)
    failing: dict[str, int] = field(default_factory=dict)

    def note(self, name: str, *arguments: object) -> int:
        self.made.append(" ".join([name, *map(str, arguments)]))
        return self.failing.get(name, 0)


class Driver(ModuleType):
    """`cuda.bindings.driver`: every function returns a tuple that begins with its status."""

    CUmemAllocationHandleType = SimpleNamespace(CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR="posix")
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED="pinned")
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE="device")
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE="rw")
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM="minimum")
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED="vmm",
        CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED="fd",
    )

    def __init__(self, calls: Calls) -> None:
        super().__init__("cuda.bindings.driver")
        self.calls = calls
        self.attributes = 1
        self.granularity = UNIT

    def __getattr__(self, name: str) -> object:
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *arguments: (Result(self.calls.note(name, *arguments)), *self._gives(name))

    def _gives(self, name: str) -> tuple[object, ...]:
        match name:
            case "cuMemCreate" | "cuMemImportFromShareableHandle":
                return ("handle",)
            case "cuMemExportToShareableHandle":
                return (os.memfd_create("stand-in", 0),)
            case "cuMemAddressReserve":
                return (0x7000000000,)
            case "cuDevicePrimaryCtxRetain" | "cuCtxPopCurrent":
                return ("context",)
        return ()

    def CUmemAllocationProp(self) -> object:
        return SimpleNamespace(location=SimpleNamespace(), __str__=lambda: "properties")

    def CUmemAccessDesc(self) -> object:
        return SimpleNamespace(location=SimpleNamespace())

    def cuDeviceGetCount(self) -> tuple[Result, int]:
        return Result.CUDA_SUCCESS, 2

    def cuDeviceGet(self, ordinal: int) -> tuple[Result, int]:
        return Result.CUDA_SUCCESS, ordinal

    def cuDeviceGetUuid(self, device: int) -> tuple[Result, object]:
        return Result.CUDA_SUCCESS, SimpleNamespace(bytes=(ZERO, ONE)[device])

    def cuDeviceGetAttribute(self, attribute: str, device: int) -> tuple[Result, int]:
        return Result.CUDA_SUCCESS, self.attributes

    def cuMemGetAllocationGranularity(self, properties: object, option: str) -> tuple[Result, int]:
        return Result.CUDA_SUCCESS, self.granularity


class Runtime(ModuleType):
    """`cupy.cuda.runtime`: failures are exceptions."""

    CUDARuntimeError = CUDARuntimeError

    def __init__(self, calls: Calls) -> None:
        super().__init__("cupy.cuda.runtime")
        self._calls = calls

    def _call(self, name: str, *arguments: object) -> None:
        if status := self._calls.note(name, *arguments):
            raise CUDARuntimeError(status)

    def setDevice(self, ordinal: int) -> None:
        self._call("setDevice", ordinal)

    def malloc(self, nbytes: int) -> int:
        self._call("malloc", nbytes)
        return 0x5000

    def free(self, address: int) -> None:
        self._call("free", address)

    def ipcGetMemHandle(self, address: int) -> bytes:
        self._call("ipcGetMemHandle", address)
        return b"h" * 64

    def ipcOpenMemHandle(self, handle: bytes) -> int:
        self._call("ipcOpenMemHandle", handle[:1])
        return 0x9000

    def ipcCloseMemHandle(self, address: int) -> None:
        self._call("ipcCloseMemHandle", address)


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
def driver(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    driver, cupy = Driver(calls), ModuleType("cupy.cuda")
    cupy.runtime = Runtime(calls)  # type: ignore[attr-defined]
    found = {"cuda": ModuleType("cuda"), "cuda.bindings": ModuleType("cuda.bindings"), "cuda.bindings.driver": driver}
    for name, module in {**found, "cupy": ModuleType("cupy"), "cupy.cuda": cupy}.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield driver
    assert "cuInit 0" in calls.made


IPC = Export(PoolKind.IPC, b"h" * 64, 0, 2 * UNIT, ONE)
VMM = Export(PoolKind.VMM, b"", 0, 2 * UNIT, ONE)


def test_ipc_exports_one_whole_allocation_of_the_named_device(driver: Driver, calls: Calls) -> None:
    made = load_driver().exporter(PoolKind.IPC).allocate(UNIT + 1, ONE)
    assert made.export == IPC and made.fd is None
    assert calls.made == ["cuInit 0", "setDevice 1", f"malloc {2 * UNIT}", f"ipcGetMemHandle {0x5000}"]
    made.close()
    made.close()
    assert calls.made[4:] == [f"free {0x5000}"]


def test_ipc_opens_once_and_closes_once(driver: Driver, calls: Calls) -> None:
    importer = load_driver().importer(PoolKind.IPC)
    assert importer.device(1) == ONE
    mapping = importer.open(Export(PoolKind.IPC, b"h" * 64, 512, 2 * UNIT, ONE), None)
    assert (mapping.address, mapping.nbytes) == (0x9000 + 512, 2 * UNIT - 512)
    mapping.close()
    mapping.close()
    wanted = ["setDevice 1", "ipcOpenMemHandle b'h'", "setDevice 1", f"ipcCloseMemHandle {0x9000}"]
    assert [call for call in calls.made if call != "cuInit 0"] == wanted


@pytest.mark.parametrize(
    ("failing", "status", "said"),
    [
        ("malloc", 35, "install an NVIDIA driver"),
        ("setDevice", 999, "cudaSetDevice failed with cudaError 999; see the kernel's log"),
        ("ipcGetMemHandle", 801, "cudaIpcGetMemHandle failed"),
    ],
)
def test_ipc_that_fails_leaves_nothing(driver: Driver, calls: Calls, failing: str, status: int, said: str) -> None:
    calls.failing[failing] = status
    with pytest.raises(DeviceError, match=said):
        cuda.exporter(PoolKind.IPC).allocate(1, ZERO)
    made = [call.split()[0] for call in calls.made]
    assert made.count("free") == (failing == "ipcGetMemHandle")


@pytest.mark.parametrize(("status", "said"), [(201, "one PID namespace"), (205, "--pool vmm")])
def test_ipc_that_cannot_be_opened_names_the_other_way(driver: Driver, calls: Calls, status: int, said: str) -> None:
    calls.failing["ipcOpenMemHandle"] = status
    with pytest.raises(DeviceError, match=said):
        cuda.importer(PoolKind.IPC).open(IPC, None)


def test_vmm_keeps_a_descriptor_and_no_handle(driver: Driver, calls: Calls) -> None:
    made = load_driver().exporter(PoolKind.VMM).allocate(UNIT + 1, ONE)
    assert made.export == VMM and made.fd is not None and not os.get_inheritable(made.fd)
    assert [call.split()[0] for call in calls.made] == [
        "cuInit",
        "cuMemCreate",
        "cuMemExportToShareableHandle",
        "cuMemRelease",
    ]
    fd = made.fd
    made.close()
    made.close()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)
    adopted = cuda.exporter(PoolKind.VMM).adopt(os.memfd_create("x"), UNIT + 1, ONE)
    assert adopted.export == VMM
    adopted.close()


def test_vmm_maps_in_order_and_undoes_it(driver: Driver, calls: Calls) -> None:
    mapping = cuda.importer(PoolKind.VMM).open(VMM, 7)
    assert (mapping.address, mapping.nbytes) == (0x7000000000, 2 * UNIT)
    names = [call.split()[0] for call in calls.made]
    assert names == [
        "cuInit",
        "cuDevicePrimaryCtxRetain",
        "cuCtxPushCurrent",
        "cuMemImportFromShareableHandle",
        "cuMemAddressReserve",
        "cuMemMap",
        "cuMemSetAccess",
        "cuMemRelease",
        "cuCtxPopCurrent",
        "cuDevicePrimaryCtxRelease",
    ]
    assert "cuMemImportFromShareableHandle 7 posix" in calls.made
    calls.made.clear()
    mapping.close()
    mapping.close()
    assert [call.split()[0] for call in calls.made][2:4] == ["cuMemUnmap", "cuMemAddressFree"] and len(calls.made) == 6
    calls.made.append("cuInit 0")


@pytest.mark.parametrize(
    ("failing", "undone"),
    [
        ("cuMemImportFromShareableHandle", []),
        ("cuMemAddressReserve", ["cuMemRelease"]),
        ("cuMemMap", ["cuMemAddressFree", "cuMemRelease"]),
        ("cuMemSetAccess", ["cuMemUnmap", "cuMemAddressFree", "cuMemRelease"]),
    ],
)
def test_vmm_that_fails_half_way_undoes_the_rest(driver: Driver, calls: Calls, failing: str, undone: list[str]) -> None:
    calls.failing[failing] = Result.CUDA_ERROR_NOT_SUPPORTED
    with pytest.raises(DeviceError, match=f"{failing} failed with CUDA_ERROR_NOT_SUPPORTED; .* try the other --pool"):
        cuda.importer(PoolKind.VMM).open(VMM, 7)
    names = [call.split()[0] for call in calls.made]
    assert names[names.index(failing) + 1 :] == [*undone, "cuCtxPopCurrent", "cuDevicePrimaryCtxRelease"]


def test_too_little_memory_is_told_apart(driver: Driver, calls: Calls) -> None:
    calls.failing = {"malloc": 2, "cuMemCreate": 2}
    for kind in (PoolKind.IPC, PoolKind.VMM):
        with pytest.raises(OutOfMemory, match="choose a smaller --kv-memory"):
            cuda.exporter(kind).allocate(1, ONE)


def test_what_a_device_cannot_do_is_said(driver: Driver) -> None:
    for kind in (PoolKind.IPC, PoolKind.VMM):
        with pytest.raises(DeviceError, match=r"GPU-78787878-.* is not visible here, only GPU-.*CUDA_VISIBLE_DEVICES"):
            cuda.exporter(kind).allocate(1, b"x" * 16)
        with pytest.raises(DeviceError, match="there is no CUDA device 2, only 2"):
            cuda.importer(kind).device(2)
    driver.granularity = 3 * UNIT
    with pytest.raises(DeviceError, match=f"units of {3 * UNIT} bytes; use --pool ipc"):
        cuda.exporter(PoolKind.VMM).allocate(1, ONE)
    driver.attributes = 0
    with pytest.raises(DeviceError, match="by file descriptors; use --pool ipc"):
        cuda.exporter(PoolKind.VMM).allocate(1, ONE)
    with pytest.raises(DeviceError, match=r"leash\.sock"):
        cuda.importer(PoolKind.VMM).open(VMM, None)


@pytest.mark.parametrize("missing", ["cuda.bindings.driver", "cupy.cuda"])
def test_without_the_packages_the_extra_is_named(driver: Driver, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    driver.calls.made.append("cuInit 0")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(DeviceError, match=r"pip install 'pagehold\[cuda13\]'"):
        cuda.exporter(PoolKind.IPC).allocate(1, ONE)


def test_without_a_driver_it_is_said(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.calls.made.append("cuInit 0")

    def absent(flags: int) -> None:
        raise RuntimeError("libcuda.so.1 cannot be found")

    monkeypatch.setattr(driver, "cuInit", absent, raising=False)
    with pytest.raises(DeviceError, match=r"no NVIDIA driver here .*--device cpu"):
        cuda.importer(PoolKind.VMM).device(0)
