"""The files behind the core: `tables` and the pool; made, adopted or refused."""

from __future__ import annotations

import mmap
import os
import secrets
from pathlib import Path
from typing import Final

import numpy as np

from kvmanager.layout import (
    HEADER_WORDS,
    LAYOUT_VERSION,
    TABLES_MAGIC,
    Geometry,
    Header,
    KvDtype,
    Tables,
)
from pagehold.runtime.memory import available_bytes
from pagehold.runtime.statedir import StateDir

EXTENT: Final = 64 << 20
_FEWEST_PAGES: Final = 2


class CannotAdopt(Exception):
    """The shared files are not ours to go on with; the message says why and what to do."""


class NoMemory(Exception):
    """The pool does not fit; the message says what is there and which flag to change."""


class Pool:
    """`tables` mapped for writing, and the pool file's size."""

    def __init__(self, state: StateDir, mapped: mmap.mmap, tables: Tables) -> None:
        self._state = state
        self._mapped = mapped
        self.tables = tables

    def word(self, name: Header) -> int:
        return int(self.tables.header[name])

    @property
    def epoch(self) -> int:
        return self.word(Header.EPOCH)

    @property
    def executor_id(self) -> bytes:
        return self.tables.header[Header.EXECUTOR_ID : Header.EXECUTOR_ID + 2].tobytes()

    @property
    def fingerprint(self) -> str:
        return self.tables.header[Header.FINGERPRINT : Header.FINGERPRINT + 4].tobytes().hex()

    @property
    def geometry(self) -> Geometry:
        return Geometry(
            pages=self.word(Header.PAGES),
            rows=self.word(Header.ROWS),
            page_size=self.word(Header.PAGE_SIZE),
            layers=self.word(Header.LAYERS),
            kv_heads=self.word(Header.KV_HEADS),
            head_dim=self.word(Header.HEAD_DIM),
            kv_dtype=KvDtype(self.word(Header.KV_DTYPE)),
            layout_id=self.word(Header.LAYOUT_ID),
            max_model_len=self.word(Header.MAX_MODEL_LEN),
        )

    def begin_epoch(self, executor_id: bytes) -> None:
        """A new executor: its id first, then the epoch, so that a death in between repeats the step."""
        header = self.tables.header
        if self.executor_id != executor_id:
            header[Header.EPOCH] = self.epoch + 1
            header[Header.EXECUTOR_ID : Header.EXECUTOR_ID + 2] = np.frombuffer(executor_id, np.uint64)

    def back(self, last_page: int) -> bool:
        """Gives memory to the pool up to and with `last_page`; False when there is none."""
        wanted = (last_page + 1) * self.word(Header.PAGE_BYTES)
        backed = self.word(Header.POOL_BYTES)
        if wanted <= backed:
            return True
        size = self.word(Header.PAGES) * self.word(Header.PAGE_BYTES)
        target = min(-(-wanted // EXTENT) * EXTENT, size)
        fd = os.open(self._state.pool, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.posix_fallocate(fd, backed, target - backed)
        except OSError:
            return False
        finally:
            os.close(fd)
        self.tables.header[Header.POOL_BYTES] = target
        return True


def create(state: StateDir, geometry: Geometry, fingerprint: str) -> Pool:
    """New files under temporary names, renamed when complete: `tables` last."""
    size = Tables.nbytes(geometry.pages, geometry.rows, geometry.row_entries, geometry.page_size)
    new_tables, new_pool = state.tables.with_suffix(".new"), state.pool.with_suffix(".new")
    _make_file(new_pool, geometry.pages * geometry.page_bytes, backed=False)
    _make_file(new_tables, size, backed=True)
    mapped = _map(new_tables)
    tables = Tables(
        memoryview(mapped), geometry.pages, geometry.rows, geometry.row_entries, geometry.page_size
    )
    header = tables.header
    for name, value in (
        (Header.MAGIC, TABLES_MAGIC),
        (Header.LAYOUT, LAYOUT_VERSION),
        (Header.PAGES, geometry.pages),
        (Header.ROWS, geometry.rows),
        (Header.ROW_ENTRIES, geometry.row_entries),
        (Header.PAGE_SIZE, geometry.page_size),
        (Header.LAYERS, geometry.layers),
        (Header.KV_HEADS, geometry.kv_heads),
        (Header.HEAD_DIM, geometry.head_dim),
        (Header.KV_DTYPE, geometry.kv_dtype),
        (Header.LAYOUT_ID, geometry.layout_id),
        (Header.MAX_MODEL_LEN, geometry.max_model_len),
        (Header.PAGE_BYTES, geometry.page_bytes),
    ):
        header[name] = value
    header[Header.POOL_UUID : Header.POOL_UUID + 2] = np.frombuffer(secrets.token_bytes(16), np.uint64)
    header[Header.BOOT_ID : Header.BOOT_ID + 2] = np.frombuffer(_boot_id(), np.uint64)
    header[Header.FINGERPRINT : Header.FINGERPRINT + 4] = np.frombuffer(bytes.fromhex(fingerprint), np.uint64)
    header[Header.READY] = 1
    new_pool.rename(state.pool)
    new_tables.rename(state.tables)
    return Pool(state, mapped, tables)


def adopt(state: StateDir) -> Pool | None:
    """The pool of an earlier manager; None when there is none. Raises CannotAdopt."""
    try:
        size = state.tables.stat().st_size
    except FileNotFoundError:
        return None
    remedy = "start with --discard to drop it"
    if size < HEADER_WORDS * 8:
        raise CannotAdopt(f"{state.tables} is damaged: too short; {remedy}")
    mapped = _map(state.tables)
    header = np.frombuffer(mapped, np.uint64, HEADER_WORDS)
    if int(header[Header.MAGIC]) != TABLES_MAGIC or int(header[Header.READY]) != 1:
        raise CannotAdopt(f"{state.tables} is damaged: not a Pagehold header; {remedy}")
    if int(header[Header.LAYOUT]) != LAYOUT_VERSION:
        raise CannotAdopt(
            f"{state.tables} has layout version {int(header[Header.LAYOUT])}, this is {LAYOUT_VERSION}; {remedy}"
        )
    if header[Header.BOOT_ID : Header.BOOT_ID + 2].tobytes() != _boot_id():
        raise CannotAdopt(f"{state.tables} is from before the last boot; {remedy}")
    shape = tuple(int(header[name]) for name in (Header.PAGES, Header.ROWS, Header.ROW_ENTRIES, Header.PAGE_SIZE))
    if size != Tables.nbytes(*shape) or not state.pool.exists():
        raise CannotAdopt(f"{state.tables} and {state.pool} do not fit together; {remedy}")
    return Pool(state, mapped, Tables(memoryview(mapped), *shape))


def pages_that_fit(state: StateDir, geometry: Geometry, pool_bytes: int) -> int:
    """How many pages `pool_bytes` makes, page 0 included. Raises NoMemory."""
    room = available_bytes(state.root)
    if pool_bytes > room:
        raise NoMemory(
            f"a page pool of {pool_bytes / 2**30:.1f} GiB does not fit: {room / 2**30:.1f} GiB of memory are free "
            "(machine, cgroup and tmpfs taken together); choose a smaller --kv-memory"
        )
    pages = pool_bytes // geometry.page_bytes
    if pages < _FEWEST_PAGES:
        raise NoMemory(
            f"a page pool of {pool_bytes} bytes holds no page of {geometry.page_bytes} bytes; choose a larger --kv-memory"
        )
    return int(pages)


def discard(state: StateDir) -> None:
    """Drops the shared files and all records."""
    for path in (state.tables, state.pool, *state.records.iterdir()):
        path.unlink(missing_ok=True)


def _make_file(path: Path, size: int, backed: bool) -> None:
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if backed:
            os.posix_fallocate(fd, 0, size)
        else:
            os.ftruncate(fd, size)
    finally:
        os.close(fd)


def _map(path: Path) -> mmap.mmap:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return mmap.mmap(fd, 0)
    finally:
        os.close(fd)


def _boot_id() -> bytes:
    return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))
