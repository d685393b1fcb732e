"""The files behind the core: `tables` and the pool; made, adopted, grown or refused.

A pool is there when `tables` is: its rename into place is made last, and undone first. A pool on a device has
no file: its memory is the manager's `Allocation`, made whole, and lost when nobody has it any more.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from kvmanager.device.memory import Allocation
from kvmanager.errors import Refusal, Refused
from kvmanager.geometry import HOST, Place, read_fingerprint, read_geometry, read_place, read_shape
from kvmanager.layout import (
    HEADER_WORDS,
    TABLES_MAGIC,
    Geometry,
    Header,
    PoolKind,
    Tables,
)
from kvmanager.logwords import LAYOUT_VERSION
from kvmanager.renewal import name, renew
from pagehold.runtime.mapping import allocate
from pagehold.runtime.memory import available_bytes
from pagehold.runtime.statedir import StateDir

EXTENT: Final = 16 << 20  # 5 ms; a multiple of a huge page
_FEWEST_PAGES: Final = 2  # page 0 is reserved
_MOST_PAGES: Final = 1 << 31  # kernels read page ids as int32
REMEDY: Final = "stop everything and start with --discard to drop it"


class CannotAdopt(Exception):
    """The shared files are not ours to go on with; the message says why and what to do."""


class Pool:
    """`tables` mapped for writing, and the memory of the pool: a file's, or a device's."""

    def __init__(self, state: StateDir, tables: Tables) -> None:
        """Raises ValueError when the header's numbers contradict each other."""
        self._path = state.pool
        self.tables = tables
        self.geometry = read_geometry(tables.header)
        self.place = read_place(tables.header)
        self.memory: Allocation | None = None  # a device's, once this manager has it
        if self.word(Header.PAGE_BYTES) != self.geometry.page_bytes:
            raise ValueError("page size")

    def word(self, name: Header) -> int:
        return int(self.tables.header[name])

    @property
    def fingerprint(self) -> str:
        """Of the model's contents: 64 hex digits."""
        return read_fingerprint(self.tables.header)

    @property
    def uuid(self) -> bytes:
        """Of the pool's memory: on a device, another memory has another."""
        return self.tables.header[Header.POOL_UUID : Header.POOL_UUID + 2].tobytes()

    @property
    def nbytes(self) -> int:
        return self.geometry.pages * self.geometry.page_bytes

    def hold(self, memory: Allocation) -> None:
        """The device's memory is there: every page has some from now on."""
        self.memory = memory
        self.tables.header[Header.POOL_BYTES] = self.nbytes

    def lose(self) -> None:
        """Nobody has the device's memory any more."""
        self.memory = None
        renew(self.tables)

    def close(self) -> None:
        """Frees a device's memory. No executor has it mapped."""
        if self.memory is not None:
            self.memory.close()
            self.memory = None

    def back(self, last_page: int) -> int:
        """Puts memory behind the pool up to and with `last_page`, in whole extents.

        Returns how many pages have memory: fewer than wanted where the machine has none left.
        """
        page_bytes, backed = self.geometry.page_bytes, self.word(Header.POOL_BYTES)
        wanted = (last_page + 1) * page_bytes
        if wanted > backed and self.place.kind is PoolKind.HOST:
            target = min(-(-wanted // EXTENT) * EXTENT, self.nbytes)
            if self._allocate(backed, target):
                self.tables.header[Header.POOL_BYTES] = backed = target
        return backed // page_bytes

    def _allocate(self, start: int, end: int) -> bool:
        try:
            room = os.statvfs(self._path)
            # Trying would take, for a moment, what others still have.
            if room.f_blocks and room.f_bavail * room.f_frsize < end - start:
                return False
            fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            allocate(fd, start, end - start)
        except OSError:
            return False
        finally:
            os.close(fd)
        return True


def create(
    state: StateDir, geometry: Geometry, fingerprint: str, place: Place = HOST, scales: list[float] | None = None
) -> Pool:
    """New files in place of old ones. Raises OSError when the tmpfs is full.

    fingerprint: 64 hex digits. scales: as many as the geometry says.
    """
    shape = (geometry.pages, geometry.rows, geometry.row_entries, geometry.page_size, geometry.scales)
    size = Tables.nbytes(*shape)
    new_tables = half_made(state)
    try:
        new_tables.unlink(missing_ok=True)
        _make_file(new_tables, size, backed=True)
        tables = _map_tables(new_tables, True, shape)
        tables.scales[:] = scales or []
        _write_header(tables, geometry, fingerprint, place)
        # Old tables must never meet a new pool.
        state.tables.unlink(missing_ok=True)
        state.pool.unlink(missing_ok=True)
        if place.kind is PoolKind.HOST:
            _make_file(state.pool, geometry.pages * geometry.page_bytes, backed=False)
        new_tables.rename(state.tables)
    except OSError:
        new_tables.unlink(missing_ok=True)
        raise
    return Pool(state, tables)


def adopt(state: StateDir) -> Pool | None:
    """The pool of an earlier manager; None when there is none, nor any leftover then. Raises CannotAdopt.

    By IPC its memory cannot be exported again, so the pool is empty from here on. A VMM pool's may come back with
    the executor that has it.
    """
    pool = examine(state, writable=True)
    half_made(state).unlink(missing_ok=True)
    if pool is None or pool.place.kind is not PoolKind.HOST:
        state.pool.unlink(missing_ok=True)
    if pool is not None and pool.place.kind is PoolKind.IPC:
        pool.lose()
    return pool


def examine(state: StateDir, writable: bool = False) -> Pool | None:
    """As `adopt`, but changes nothing."""
    try:
        size = state.tables.stat().st_size
        header = np.fromfile(state.tables, np.uint64, HEADER_WORDS)
    except FileNotFoundError:
        if any(state.records.glob("*.req")):
            raise CannotAdopt(f"{state.records} holds requests, but their {state.tables} is gone; {REMEDY}") from None
        return None
    if size < HEADER_WORDS * 8 or int(header[Header.MAGIC]) != TABLES_MAGIC or int(header[Header.READY]) != 1:
        raise CannotAdopt(f"{state.tables} is damaged: not a Pagehold header; {REMEDY}")
    version = int(header[Header.LAYOUT])
    if version != LAYOUT_VERSION:
        raise CannotAdopt(f"{state.tables} has layout version {version}, this is {LAYOUT_VERSION}; {REMEDY}")
    if header[Header.BOOT_ID : Header.BOOT_ID + 2].tobytes() != _boot_id():
        raise CannotAdopt(f"{state.tables} is from before the last boot of this machine; {REMEDY}")
    shape = read_shape(header)
    try:
        if size != Tables.nbytes(*shape):
            raise ValueError("length")
        pool = Pool(state, _map_tables(state.tables, writable, shape))
    except ValueError as error:
        raise CannotAdopt(f"{state.tables} is damaged: wrong {error}; {REMEDY}") from error
    if pool.place.kind is PoolKind.HOST:
        _check_pool_file(state, pool)
    return pool


def _check_pool_file(state: StateDir, pool: Pool) -> None:
    try:
        stat = state.pool.stat()
    except FileNotFoundError:
        raise CannotAdopt(f"{state.pool} is gone; {REMEDY}") from None
    if stat.st_size != pool.nbytes or stat.st_blocks * 512 < pool.word(Header.POOL_BYTES):
        raise CannotAdopt(f"{state.pool} is not the pool of {state.tables}; {REMEDY}")


def fitting(state: StateDir, geometry: Geometry, pool_bytes: int, place: Place = HOST) -> Geometry:
    """The geometry with as many pages as `pool_bytes` makes; a pool that is there makes way for it.

    Whether a device has so much memory is seen when it is allocated. Raises Refused(NO_MEMORY).
    """
    pages = pool_bytes // geometry.page_bytes
    if pages < _FEWEST_PAGES:
        least = _FEWEST_PAGES * geometry.page_bytes
        message = f"a page pool of {pool_bytes} bytes is too small; choose a --kv-memory of at least {least} bytes"
        raise Refused(Refusal.NO_MEMORY, message)
    pages = min(pages, _MOST_PAGES)
    tables = Tables.nbytes(pages, geometry.rows, geometry.row_entries, geometry.page_size, geometry.scales)
    room = available_bytes(state.root) + _held(state.pool)
    on_host = pool_bytes if place.kind is PoolKind.HOST else 0
    if on_host + tables > room:
        message = (
            f"a page pool of {_gib(on_host)} with tables of {_gib(tables)} does not fit: {_gib(room)} are left "
            "(the least of tmpfs, free memory and the cgroup's limit); choose a smaller --kv-memory"
        )
        raise Refused(Refusal.NO_MEMORY, message)
    return replace(geometry, pages=pages)


def _held(path: Path) -> int:
    """Bytes of memory behind a file."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def discard(state: StateDir) -> None:
    """Drops the shared files and all records. Both locks are held; see `vacant.discard`."""
    for path in (state.tables, state.pool, half_made(state), *state.records.iterdir()):
        path.unlink(missing_ok=True)


def _write_header(tables: Tables, geometry: Geometry, fingerprint: str, place: Place) -> None:
    header = tables.header
    header[Header.MAGIC] = TABLES_MAGIC
    header[Header.LAYOUT] = LAYOUT_VERSION
    header[Header.PAGES] = geometry.pages
    header[Header.ROWS] = geometry.rows
    header[Header.ROW_ENTRIES] = geometry.row_entries
    header[Header.PAGE_SIZE] = geometry.page_size
    header[Header.LAYERS] = geometry.layers
    header[Header.KV_HEADS] = geometry.kv_heads
    header[Header.HEAD_DIM] = geometry.head_dim
    header[Header.KV_DTYPE] = geometry.kv_dtype
    header[Header.LAYOUT_ID] = geometry.layout_id
    header[Header.MAX_MODEL_LEN] = geometry.max_model_len
    header[Header.PAGE_BYTES] = geometry.page_bytes
    header[Header.POOL_KIND] = place.kind
    header[Header.DEVICE_UUID : Header.DEVICE_UUID + 2] = np.frombuffer(place.device, np.uint64)
    name(header)
    header[Header.BOOT_ID : Header.BOOT_ID + 2] = np.frombuffer(_boot_id(), np.uint64)
    header[Header.FINGERPRINT : Header.FINGERPRINT + 4] = np.frombuffer(bytes.fromhex(fingerprint), np.uint64)
    header[Header.READY] = 1


def _make_file(path: Path, size: int, backed: bool) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        if backed:
            os.posix_fallocate(fd, 0, size)  # a full tmpfs is an error here, not a SIGBUS later
        else:
            os.ftruncate(fd, size)
    finally:
        os.close(fd)


def _map_tables(path: Path, writable: bool, shape: tuple[int, int, int, int, int]) -> Tables:
    fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    try:
        return Tables(memoryview(mmap.mmap(fd, 0, prot=protection)), *shape)
    finally:
        os.close(fd)


def half_made(state: StateDir) -> Path:
    """Tables that are not in place yet."""
    return state.tables.with_suffix(".new")


def _boot_id() -> bytes:
    return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
