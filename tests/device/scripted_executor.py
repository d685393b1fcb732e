"""An executor of its own process that does nothing but hold a pool: attaches, and does what its test says.

Started by a fork server that has imported everything, so that one more costs milliseconds.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kvmanager.layout import PoolKind
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime.lock import FileLock
from pagehold.runtime.statedir import StateDir
from services.executor.devicepool import DevicePool
from services.executor.kv_link import KvLink
from services.executor.shared import SharedPool
from tests.device import fake_memory
from tests.unit.kvmanager.files import attach_request, key_log, log_keys

_WAIT_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Attachment:
    """What an attach has come to."""

    epoch: int
    is_new: bool
    pool_uuid: bytes
    generation: int
    opened: bool  # a mapping; False: the one from before is still it


@dataclass(frozen=True, slots=True)
class Lost:
    """What was computed is gone, and the logs say so."""


@dataclass(frozen=True, slots=True)
class Fatal:
    message: str


class _Executor:
    def __init__(self, root: Path, kind: PoolKind, identity: bytes, pipe: Connection) -> None:
        self._state = StateDir.prepare(root)
        self._pipe = pipe
        self._lock = FileLock(self._state.executor_lock)
        self._lock.acquire(wait=True)
        self._lock.write_id(identity)
        self._shared = SharedPool(self._state)
        importer = fake_memory.importer(kind)
        self._pool = DevicePool(self._state, self._shared, importer, kind, importer.device(0), self._lost)
        self._request = attach_request(identity)
        self._bytes = memoryview(b"")

    async def run(self) -> None:
        address = f"unix:{self._state.kvmanager_socket}"
        link = KvLink(address, lambda: self._pool.prepared(self._request), self._attached, self._answered, self._fatal)
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._obey, args=(loop, link), daemon=True).start()
        await link.run()

    def _attached(self, response: kv.AttachResponse) -> None:
        if not self._shared.mapped:
            self._shared.map_tables()
        mapping = self._pool.opened(response.export)
        if mapping is not None:
            self._bytes = fake_memory.view_of(mapping)
        export = response.export
        is_new, opened = response.pool_is_new, mapping is not None
        self._pipe.send(Attachment(response.epoch, is_new, export.pool_uuid, export.generation, opened))

    def _answered(self, call: kv.Call, reply: kv.Reply) -> None:
        self._pipe.send(reply.SerializeToString())

    def _fatal(self, error: kv.Error) -> None:
        self._pipe.send(Fatal(error.message))

    async def _lost(self) -> None:
        for key in log_keys(self._state.records):
            (log,) = key_log(self._state.records, key)
            log.set_progress(0, log.known)
        self._bytes = memoryview(b"")
        self._pipe.send(Lost())

    def _obey(self, loop: asyncio.AbstractEventLoop, link: KvLink) -> None:
        while True:
            match self._pipe.recv():
                case "write", bytes(data):
                    self._bytes[: len(data)] = data
                    self._pipe.send(len(self._bytes))
                case "read", int(count):
                    self._pipe.send(bytes(self._bytes[:count]))
                case "call", bytes(call):
                    loop.call_soon_threadsafe(link.send, [kv.Call.FromString(call)])
                case "unlock":
                    self._lock.release()
                    self._pipe.send(None)


def _main(root: Path, kind: PoolKind, identity: bytes, pipe: Connection) -> None:
    asyncio.run(_Executor(root, kind, identity, pipe).run())


class ScriptedExecutor:
    """The test's side of it."""

    def __init__(self, root: Path, kind: PoolKind, number: int) -> None:
        """Returns at once; see `attachment`."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._pipe, theirs = context.Pipe()
        arguments = (root, kind, number.to_bytes(16, "little"), theirs)
        self._process = context.Process(target=_main, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def said(self, seconds: float = _WAIT_SECONDS) -> Any:
        """What it says next; None: nothing for so long."""
        return self._pipe.recv() if self._pipe.poll(seconds) else None

    def attachment(self) -> Attachment:
        said = self.said()
        assert isinstance(said, Attachment), said
        return said

    def write(self, data: bytes) -> None:
        """To the beginning of the pool."""
        self._pipe.send(("write", data))
        assert self.said() >= len(data)

    def read(self, count: int) -> bytes:
        """From the beginning of the pool."""
        self._pipe.send(("read", count))
        found = self.said()
        assert isinstance(found, bytes), found
        return found

    def call(self, call: kv.Call) -> kv.Reply:
        self._pipe.send(("call", call.SerializeToString()))
        return kv.Reply.FromString(self.said())

    def unlock(self) -> None:
        """Lives on without executor.lock, as a process that dies does for a while."""
        self._pipe.send("unlock")
        assert self.said() is None

    def stop(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Returns once it is dead."""
        self._process.kill()
        self._process.join()
        self._process.close()
        self._pipe.close()
