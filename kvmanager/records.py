"""The record files: `<key>.log`, then `<key>.req`, whose rename into place is the commit of `open`."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvmanager.core import Source
from kvmanager.layout import RequestLog, request_key
from kvmanager.prefix import root_hash
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.v1 import inference_pb2 as api


class OtherBody(Exception):
    """The key is taken by a request with another digest."""


class QuotaReached(Exception):
    """Records and logs are at their byte quota."""


@dataclass(slots=True)
class Record:
    digest: bytes
    source: Source
    nbytes: int
    ended_at: float = 0.0  # monotonic seconds when all outputs were first seen ended; 0: not yet

    @property
    def ended(self) -> bool:
        return all(output.ended for output in self.source.outputs)


class Records:
    """Every record in the folder, its log mapped read-only."""

    def __init__(self, folder: Path, fingerprint: str, quota: int, hit: Callable[[str], None]) -> None:
        self._folder = folder
        self._fingerprint = fingerprint
        self._quota = quota
        self._hit = hit
        self._records: dict[str, Record] = {}
        self._bytes = 0
        self._adopt()

    def __len__(self) -> int:
        return len(self._records)

    @property
    def keys(self) -> list[str]:
        return list(self._records)

    def source(self, key: str) -> Source | None:
        record = self._records.get(key)
        return record.source if record is not None else None

    def open(self, record: kv.RequestRecord) -> tuple[str, bool]:
        """Writes the record unless it is there. Returns its key and whether it was.

        Raises OtherBody, QuotaReached, OSError when the tmpfs is full.
        """
        key = request_key(record.tenant, record.request_id)
        known = self._records.get(key)
        if known is not None:
            if known.digest != record.digest:
                raise OtherBody(key)
            return key, True
        capacity = len(record.prompt) + record.max_tokens
        log_bytes = RequestLog.nbytes(record.outputs, capacity, record.logprobs)
        data = record.SerializeToString()
        if self._bytes + log_bytes + len(data) > self._quota:
            raise QuotaReached(f"records hold {self._bytes} of {self._quota} bytes")
        try:
            self._write(key, record, capacity, log_bytes, data)
        except OSError:
            for suffix in (".log", ".tmp"):
                (self._folder / f"{key}{suffix}").unlink(missing_ok=True)
            raise
        self._remember(key, record, log_bytes + len(data))
        self._hit("kvmanager.open.after")
        return key, False

    def _write(self, key: str, record: kv.RequestRecord, capacity: int, log_bytes: int, data: bytes) -> None:
        fd = os.open(self._folder / f"{key}.log", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, log_bytes)  # a full tmpfs is an error here, not a SIGBUS later
            with mmap.mmap(fd, log_bytes) as mapped:
                view = memoryview(mapped)
                log = RequestLog.create(
                    view, record.outputs, capacity, np.array(record.prompt, np.uint32), record.logprobs
                )
                del log
                view.release()
        finally:
            os.close(fd)
        self._hit("kvmanager.open.log_written")
        temporary = self._folder / f"{key}.tmp"
        temporary.write_bytes(data)
        self._hit("kvmanager.open.before_rename")
        temporary.rename(self._folder / f"{key}.req")

    def forget(self, key: str) -> None:
        """Drops the files. A late writer writes into a dead inode."""
        record = self._records.pop(key, None)
        if record is not None:
            self._bytes -= record.nbytes
        for suffix in (".req", ".log"):  # in this order: a log without a record is nobody's
            (self._folder / f"{key}{suffix}").unlink(missing_ok=True)

    def expired(self, now: float, ttl: float) -> list[str]:
        """Keys of records whose outputs all ended at least `ttl` seconds ago."""
        keys: list[str] = []
        for key, record in self._records.items():
            if record.ended_at:
                if now - record.ended_at > ttl:
                    keys.append(key)
            elif record.ended:
                record.ended_at = now
        return keys

    def _adopt(self) -> None:
        for path in self._folder.glob("*.req"):
            key = path.stem
            try:
                data = path.read_bytes()
                log_path = path.with_suffix(".log")
                self._remember(key, kv.RequestRecord.FromString(data), len(data) + log_path.stat().st_size)
            except (FileNotFoundError, ValueError):
                path.unlink(missing_ok=True)  # killed between the two unlinks of `forget`
        for path in [*self._folder.glob("*.log"), *self._folder.glob("*.tmp")]:
            if path.stem not in self._records:
                path.unlink(missing_ok=True)

    def _remember(self, key: str, record: kv.RequestRecord, nbytes: int) -> None:
        with (self._folder / f"{key}.log").open("rb") as file:
            log = RequestLog(memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)))
        salt = api.GenerateRequest.FromString(record.request).cache_salt
        source = Source(log.outputs, root_hash(self._fingerprint, record.tenant, salt))
        self._records[key] = Record(record.digest, source, nbytes)
        self._bytes += nbytes
