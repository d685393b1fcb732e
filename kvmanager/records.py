"""The record files: `<key>.log`, then `<key>.req`, whose rename into place is the commit of `open`.

.log ──▶ .tmp ──rename──▶ .req          open: a death before the rename leaves nothing that counts
.req unlinked ──▶ .log unlinked         forget: the first unlink is the commit
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import structlog
from google.protobuf.message import DecodeError

from kvmanager.errors import Refusal, Refused
from kvmanager.keys import request_key
from kvmanager.layout import RequestLog
from kvmanager.pins import Pin
from kvmanager.prefix import Hash, root_hash
from kvmanager.source import Source
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime.descriptors import is_scarcity
from pagehold.runtime.mapping import map_descriptor, map_shared
from pagehold.v1 import inference_pb2 as api

log = structlog.get_logger()

_MOST_RECORDS: Final = 50_000  # one mapped log each while it is open; the kernel allows a process 65,530
_FILE_BLOCK: Final = 4096


@dataclass(slots=True)
class Record:
    digest: bytes
    root: Hash
    pin: Pin | None
    nbytes: int
    logs: Source | None  # None: ended, and not mapped any more
    ended_at: float | None = None  # monotonic seconds when all outputs were first seen ended


class Records:
    """Every record in the folder. Logs are mapped read-only: the executor alone writes them."""

    def __init__(self, folder: Path, fingerprint: str, quota: int, hit: Callable[[str], None]) -> None:
        """Adopts what is there, and removes what a death left half-made. Raises OSError for want of descriptors."""
        self._folder = folder
        self._fingerprint = fingerprint
        self._quota = quota
        self._hit = hit
        self._records: dict[str, Record] = {}
        self._nbytes = 0
        self.pinning: set[str] = set()  # keys of records that reserve a prefix
        self._adopt()

    def __len__(self) -> int:
        return len(self._records)

    @property
    def unfinished_keys(self) -> set[str]:
        """Of records with an output that has no terminal word. Those not mapped any more have none."""
        return {key for key, record in self._records.items() if record.logs is not None and not _over(record.logs)}

    @property
    def unfinished(self) -> list[Source]:
        """Of the records with an output that has not ended. Those not mapped any more have none."""
        return [
            source for record in self._records.values() if (source := record.logs) is not None and not _over(source)
        ]

    def source(self, key: str) -> Source | None:
        """The logs of a record; None when there is no such record."""
        record = self._records.get(key)
        if record is None:
            return None
        if record.logs is None:
            record.logs = Source(self._map(key).outputs, record.root, record.pin)
        return record.logs

    def mapped(self) -> Iterator[tuple[str, Source | None]]:
        """Every key, and its logs as far as they are mapped."""
        return ((key, record.logs) for key, record in self._records.items())

    def find(self, record: kv.RequestRecord) -> str | None:
        """The key under which it is kept already. Raises Refused(ALREADY_EXISTS) for another body."""
        key = request_key(record.tenant, record.request_id)
        known = self._records.get(key)
        if known is None:
            return None
        if known.digest != record.digest:
            raise Refused(Refusal.ALREADY_EXISTS, f"{key} is in use with another body")
        return key

    def write(self, record: kv.RequestRecord) -> str:
        """Makes both files of a new record; returns its key. Raises Refused(QUOTA or INVALID)."""
        key = request_key(record.tenant, record.request_id)
        root, pin = self.names(record)
        capacity = len(record.prompt) + record.max_tokens
        log_bytes = RequestLog.nbytes(record.outputs, capacity, record.logprobs)
        data = record.SerializeToString()
        nbytes = _on_disk(log_bytes) + _on_disk(len(data))
        if self._nbytes + nbytes > self._quota or len(self._records) >= _MOST_RECORDS:
            held = f"{len(self._records)} records hold {self._nbytes} of {self._quota} bytes"
            raise Refused(Refusal.QUOTA, f"{held}, another {nbytes} do not fit; see --record-quota")
        try:
            self._write_log(key, record, capacity, log_bytes)
            self._hit("kvmanager.open.log_written")
            temporary = self._folder / f"{key}.tmp"
            temporary.write_bytes(data)
            self._hit("kvmanager.open.before_rename")
            logs = Source(self._map(key).outputs, root, pin)
            temporary.rename(self._folder / f"{key}.req")
        except OSError as error:
            for suffix in (".log", ".tmp"):
                (self._folder / f"{key}{suffix}").unlink(missing_ok=True)
            raise Refused(Refusal.QUOTA, f"cannot write the record: {error.strerror}") from error
        self._remember(key, record.digest, logs, nbytes)
        self._hit("kvmanager.open.after")
        return key

    def names(self, record: kv.RequestRecord) -> tuple[Hash, Pin | None]:
        """Where the hash chains of its pages start, and what is to be pinned. Raises Refused(INVALID)."""
        try:
            request = api.GenerateRequest.FromString(record.request)
        except DecodeError:
            raise Refused(Refusal.INVALID, "the record's request is not a GenerateRequest") from None
        pin = Pin(record.tenant, request.pin_prefix) if request.pin_prefix else None
        return root_hash(self._fingerprint, record.tenant, request.cache_salt), pin

    def _write_log(self, key: str, record: kv.RequestRecord, capacity: int, log_bytes: int) -> None:
        path = self._folder / f"{key}.log"
        path.unlink(missing_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, log_bytes)  # a full tmpfs is an error here, not a SIGBUS later
            view = map_descriptor(fd, log_bytes, writable=True)
        finally:
            os.close(fd)
        prompt = np.fromiter(record.prompt, np.uint32, len(record.prompt))
        RequestLog.create(view, record.outputs, capacity, prompt, record.logprobs)

    def forget(self, key: str) -> None:
        """Drops the files, if they are there. A late writer writes into a dead inode."""
        record = self._records.pop(key, None)
        if record is not None:
            self._nbytes -= record.nbytes
            self.pinning.discard(key)
        for suffix in (".req", ".log"):
            (self._folder / f"{key}{suffix}").unlink(missing_ok=True)

    def ended(self, key: str) -> bool:
        """Whether every output has its terminal word."""
        record, source = self._records.get(key), self.source(key)
        return record is None or source is None or _over(source)

    def expired(self, now: float, ttl: float) -> list[str]:
        """Keys of records whose outputs have all been ended for `ttl` seconds. now: monotonic seconds."""
        keys: list[str] = []
        for key, record in self._records.items():
            if record.ended_at is not None:
                if now - record.ended_at >= ttl:
                    keys.append(key)
            elif record.logs is None or _over(record.logs):
                record.ended_at = now
        return keys

    def unmap_ended(self, in_use: set[str]) -> None:
        """Ended records keep their files, not their mappings. in_use: keys that have a row."""
        for key, record in self._records.items():
            if record.ended_at is not None and key not in in_use:
                record.logs = None

    def _adopt(self) -> None:
        for path in [*self._folder.glob("*.tmp"), *self._folder.glob("*.log")]:
            if path.suffix == ".tmp" or not path.with_suffix(".req").exists():
                path.unlink(missing_ok=True)
        for path in self._folder.glob("*.req"):
            try:
                self._adopt_one(path)
            except (OSError, ValueError, DecodeError, Refused) as error:
                if is_scarcity(error):
                    raise
                # Out of the way, not away: one damaged record must not keep all others from being served.
                log.error("damaged record set aside", key=path.stem, error=str(error))
                set_aside(self._folder, path.stem)

    def _adopt_one(self, path: Path) -> None:
        key, data = path.stem, path.read_bytes()
        record = kv.RequestRecord.FromString(data)
        nbytes = _on_disk(path.with_suffix(".log").stat().st_size) + _on_disk(len(data))
        logs = Source(self._map(key).outputs, *self.names(record))
        if not logs.outputs or not all(output.is_sound for output in logs.outputs):
            raise ValueError("its log contradicts itself")
        self._remember(key, record.digest, logs, nbytes)

    def _remember(self, key: str, digest: bytes, logs: Source, nbytes: int) -> None:
        self._records[key] = Record(digest, logs.root, logs.pin, nbytes, logs)
        self._nbytes += nbytes
        if logs.pin is not None:
            self.pinning.add(key)

    def _map(self, key: str) -> RequestLog:
        return RequestLog(map_shared(self._folder / f"{key}.log", writable=False))


def set_aside(folder: Path, key: str) -> None:
    """Its files are read by nobody any more, but by whoever wants to know what happened."""
    for suffix in (".req", ".log"):
        path = folder / f"{key}{suffix}"
        if path.exists():
            path.rename(path.with_name(f"{path.name}.damaged"))


def _over(source: Source) -> bool:
    return all(output.ended for output in source.outputs)


def _on_disk(nbytes: int) -> int:
    return -(-nbytes // _FILE_BLOCK) * _FILE_BLOCK
