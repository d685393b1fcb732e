"""Device memory as its two ends see it: the manager allocates and exports, the executor imports and maps.

    exporter ──allocate──▶ Allocation ──export (and a descriptor)──▶ importer ──open──▶ Mapping

What outlives whom:
    executor killed    the allocation stays with the manager; the next executor opens the same export
    manager killed     IPC: the executor's mapping keeps the memory, but nobody can export it again
                       VMM: the executor's descriptor keeps the memory, and the next manager takes it over
    both killed        the memory is gone

The real driver is `kvmanager.device.cuda`. Another module of the same two functions can stand in for it.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Final, Protocol, cast

from kvmanager.layout import PoolKind

UNIT: Final = 2 << 20  # bytes: the granularity of device memory; IPC hands over whole allocations only
_REAL_DRIVER: Final = "kvmanager.device.cuda"


class DeviceError(Exception):
    """Device memory cannot be had or handed over; the message is one sentence that says what to do."""


class OutOfMemory(DeviceError):
    """There is not enough of it now. What a killed process had comes back a while after its death."""


@dataclass(frozen=True, slots=True)
class Export:
    """What an importer needs. A handle's bytes are no identity: the pool's uuid and generation are."""

    kind: PoolKind
    handle: bytes  # IPC: 64 bytes; VMM: none, the descriptor goes beside
    offset: int  # bytes from the allocation's base
    nbytes: int  # of the allocation, a multiple of UNIT
    device: bytes  # uuid, 16 bytes


class Allocation(ABC):
    """Memory that lives at least until `close`, or until the death of this process."""

    export: Export

    @property
    def fd(self) -> int | None:
        """The descriptor to hand over; this object's own. None: the handle is all it takes."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Frees it. No importer may have it mapped: for legacy IPC that would be undefined behaviour."""


class Exporter(ABC):
    """The manager's end."""

    @abstractmethod
    def allocate(self, nbytes: int, device: bytes) -> Allocation:
        """`nbytes`, rounded up to whole UNITs, on the device of this uuid. Raises DeviceError, OutOfMemory."""

    def adopt(self, fd: int, nbytes: int, device: bytes) -> Allocation:
        """An earlier manager's allocation of `nbytes`, from its descriptor, which is this object's from now on."""
        raise DeviceError("this memory cannot be handed on from one manager to the next; use --pool vmm")


class Mapping(ABC):
    """Device memory that this process can use, and does not own."""

    address: int  # of the pool
    nbytes: int  # from there on

    @abstractmethod
    def close(self) -> None:
        """Unmaps it. Nothing may use it any more."""


class Importer(ABC):
    """The executor's end. Used only after the device's primary context was made, on any thread."""

    @abstractmethod
    def device(self, ordinal: int) -> bytes:
        """The uuid of a device that this process sees. Raises DeviceError."""

    @abstractmethod
    def open(self, export: Export, fd: int | None) -> Mapping:
        """Opened once, closed once. fd: stays the caller's. Raises DeviceError."""


class Driver(Protocol):
    """A module with both ends."""

    def exporter(self, kind: PoolKind) -> Exporter: ...

    def importer(self, kind: PoolKind) -> Importer: ...


def load_driver(name: str = "") -> Driver:
    """name: the module that stands in for CUDA; empty: CUDA."""
    return cast(Driver, importlib.import_module(name or _REAL_DRIVER))


def whole_units(nbytes: int) -> int:
    return -(-nbytes // UNIT) * UNIT


def uuid_name(uuid: bytes) -> str:
    """As nvidia-smi writes it."""
    text = uuid.hex()
    return "GPU-" + "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
