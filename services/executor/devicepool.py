"""The executor's end of a pool in device memory: greets, opens what the manager exports, lets go of what is lost.

    nothing mapped ──greet──▶ attach ──the answer's export──▶ mapped
         ▲                                                      │ the manager was restarted
         │                                                      ▼ greet
         └── computed = 0 everywhere, unmapped ◀── lost      the same pool uuid: attach, go on

Before every attach the tables say which pool the manager has now. If it is not the one that is mapped here,
then what was computed is lost with it: a legacy IPC pool cannot outlive its manager. A VMM pool is offered back
with the greeting, by the descriptor that this process keeps.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from kvmanager.device import packets
from kvmanager.device.memory import DeviceError, Export, Importer, Mapping, uuid_name
from kvmanager.device.packets import NO_POOL, NotOurs
from kvmanager.device.refusals import Identity, refused_mps
from kvmanager.layout import PoolKind
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime.statedir import StateDir
from services.executor.backend import PoolGone
from services.executor.shared import SharedPool

log = structlog.get_logger()

_RETRY_SECONDS: Final = 0.02
_HAND_OVER_SECONDS: Final = 5.0  # it is sent before the answer that it belongs to
_NOT_HANDED_OVER: Final = "the pool's descriptor did not come over leash.sock; starting again"


class DevicePool:
    """Runs on the event loop. Opens at most one mapping at a time."""

    def __init__(
        self,
        state: StateDir,
        shared: SharedPool,
        importer: Importer,
        kind: PoolKind,
        device: bytes,
        lost: Callable[[], Awaitable[None]],
    ) -> None:
        """device: uuid, as the importer says it. shared: its tables are mapped once there is a pool.

        lost(): finishes the step in flight, then stores computed = 0 for every sequence and takes its row away;
        nothing uses the mapping from then on. Raises DeviceError for what can never work.
        """
        if refused := refused_mps(os.environ):
            raise DeviceError(refused)
        self._state = state
        self._shared = shared
        self._importer = importer
        self._kind = kind
        self._device = device
        self._lost = lost
        self._leash: socket.socket | None = None
        self._pidfd = packets.pidfd_of_self()
        self._pool_uuid = NO_POOL  # of what is mapped
        self._fd: int | None = None  # of what is mapped; keeps a VMM pool alive without its manager
        self._mapping: Mapping | None = None

    async def prepared(self, request: kv.AttachRequest) -> kv.AttachRequest:
        """The request of the next attach, with what the device adds, once its manager has been greeted.

        Waits for a manager as long as there is none.
        """
        leash = await self._connect()
        if self._mapping is not None and self._shared.pool_uuid != self._pool_uuid:
            log.warning("the manager has lost the memory of the pool; known tokens are computed again")
            await self._lost()
            self._drop()
        fds = [self._pidfd] + ([] if self._fd is None else [self._fd])
        try:
            packets.send(leash, request.executor_id, self._pool_uuid if self._fd is not None else NO_POOL, fds)
        except OSError:
            pass  # that manager is gone as well: the attach fails, and the next one greets the next one
        identity, prepared = Identity.own(), kv.AttachRequest()
        prepared.CopyFrom(request)
        prepared.device.CopyFrom(
            kv.Device(
                kind=kv.PoolKind.Name(self._kind),
                uuid=self._device,
                pid=identity.pid,
                pid_namespace=identity.pid_namespace,
                mapped_pool=b"" if self._mapping is None else self._pool_uuid,
            )
        )
        return prepared

    def opened(self, export: kv.Export) -> Mapping | None:
        """The pool's memory after an attach; None: what was opened before is still it.

        Raises DeviceError for what can never work, and PoolGone where the next executor will do better.
        """
        fd = self._receive(export) if self._kind is PoolKind.VMM else None
        try:
            if self._mapping is not None and export.pool_uuid == self._pool_uuid:
                return None
            if self._mapping is not None:
                raise PoolGone("the manager has another pool than the one that is mapped; starting again")
            self._mapping = self._importer.open(self._checked(export), fd)
            self._pool_uuid, self._fd, fd = export.pool_uuid, fd, None
        finally:
            if fd is not None:
                os.close(fd)
        return self._mapping

    def close(self) -> None:
        """Lets go of everything; nothing uses the mapping any more."""
        self._drop()
        self._hang_up()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    async def _connect(self) -> socket.socket:
        """Anew for each attach: the manager behind the last connection may be dead."""
        self._hang_up()
        while True:
            try:
                leash = packets.connect(self._state.leash_socket)
            except OSError:
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            leash.settimeout(_HAND_OVER_SECONDS)
            self._leash = leash
            return leash

    def _receive(self, export: kv.Export) -> int:
        assert self._leash is not None, "greeted before every attach"
        try:
            packet = packets.receive(self._leash)
        except (OSError, NotOurs) as error:
            raise PoolGone(f"{_NOT_HANDED_OVER}: {error}") from error
        if packet is None or packet.pool_uuid != export.pool_uuid or len(packet.fds) != 1:
            if packet is not None:
                packet.close()
            raise PoolGone(_NOT_HANDED_OVER)
        return packet.fds.pop()

    def _checked(self, export: kv.Export) -> Export:
        """Raises DeviceError unless it is what was asked for, and large enough for what the tables say."""
        made = Export(PoolKind(export.kind), export.handle, export.offset, export.size, export.device_uuid)
        geometry = self._shared.geometry
        if made.kind is not self._kind or made.device != self._device:
            there = f"{made.kind.name} memory of {uuid_name(made.device)}"
            raise DeviceError(f"the manager exports {there}; start it with the same --pool and the same GPUs")
        if made.nbytes - made.offset < geometry.pages * geometry.page_bytes:
            raise DeviceError("the memory that the manager exports is smaller than its pool; start both again")
        return made

    def _drop(self) -> None:
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        self._pool_uuid = NO_POOL

    def _hang_up(self) -> None:
        if self._leash is not None:
            self._leash.close()
            self._leash = None
