"""The manager's end of leash.sock: who may have work on the device, and the proof that it has none any more.

    greeted ──attach──▶ attached ──killed: its pidfd becomes readable──▶ gone
                                      the next executor's attach waits for this

`executor.lock` alone does not prove a device quiet: it is free as soon as the dying process has closed that
file, which may be before the driver has stopped its kernels. The pidfd is readable after all of that.
A manager that has just started knows no former executor, and needs none: it still has no memory for a pool, or
takes that of the very executor that attaches.

The end of a connection is only a hint: it proves nothing, and nothing follows from it but that it is closed.
"""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import structlog

from kvmanager.device import packets
from kvmanager.device.packets import NO_POOL, NotOurs, Packet

log = structlog.get_logger()

_BACKLOG: Final = 16
_SAY_AFTER: Final = 1.0  # seconds of waiting for a death


@dataclass(slots=True)
class _Executor:
    """One that has greeted, and is not proved dead."""

    pidfd: int
    connection: socket.socket
    offer: Packet | None = None  # the descriptor of the pool that it still has
    is_fresh: bool = True  # no attach has followed this greeting yet

    def close(self) -> None:
        self.withdraw()
        os.close(self.pidfd)

    def withdraw(self) -> None:
        if self.offer is not None:
            self.offer.close()
        self.offer = None


class Leash:
    """Runs on the event loop; nothing here blocks it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._listener: socket.socket | None = None
        self._executors: dict[bytes, _Executor] = {}
        self._connections: set[socket.socket] = set()
        self._greeted = asyncio.Event()  # set and replaced at every greeting

    def start(self) -> None:
        """manager.lock is held, so whoever left a socket there is dead."""
        self._path.unlink(missing_ok=True)
        kind = socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._listener = socket.socket(socket.AF_UNIX, kind)
        self._listener.bind(os.fspath(self._path))
        self._listener.listen(_BACKLOG)
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def close(self) -> None:
        for connection in list(self._connections):
            self._end(connection)
        for executor in self._executors.values():
            executor.close()
        self._executors = {}
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()

    # --- what an attach asks for ---

    async def greeting(self, executor_id: bytes, seconds: float) -> bool:
        """Waits for the greeting that belongs to this executor's attach; False: none comes for so long.

        Each counts once: what is handed over must not go to the connection of an earlier one.
        """
        try:
            async with asyncio.timeout(seconds):
                while (executor := self._executors.get(executor_id)) is None or not executor.is_fresh:
                    await self._greeted.wait()
        except TimeoutError:
            return False
        executor.is_fresh = False
        return True

    async def others_gone(self, executor_id: bytes) -> None:
        """Waits until every other executor that ever greeted is proved dead. May be cancelled."""
        for other in [one for one in self._executors if one != executor_id]:
            executor = self._executors[other]
            await _readable(executor.pidfd)
            if self._executors.get(other) is executor:
                del self._executors[other]
                executor.close()

    def take_offer(self, executor_id: bytes, pool_uuid: bytes) -> int | None:
        """The descriptor of this pool, if the executor has offered it: the caller's from now on."""
        executor = self._executors.get(executor_id)
        offer = executor.offer if executor is not None else None
        if offer is None or offer.pool_uuid != pool_uuid or not offer.fds:
            return None
        return offer.fds.pop()

    def hand_over(self, executor_id: bytes, pool_uuid: bytes, fd: int) -> None:
        """Sends the pool's descriptor. An executor that is gone does not get it."""
        executor = self._executors.get(executor_id)
        if executor is None:
            return
        executor.withdraw()
        try:
            packets.send(executor.connection, executor_id, pool_uuid, [fd])
        except OSError as error:
            log.info("the pool's descriptor was not taken", error=error.strerror)

    # --- connections ---

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            log.warning("no connection on leash.sock", error=error.strerror)
            return
        connection.setblocking(False)
        self._connections.add(connection)
        asyncio.get_running_loop().add_reader(connection, partial(self._receive, connection))

    def _receive(self, connection: socket.socket) -> None:
        try:
            packet = packets.receive(connection)
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, NotOurs) as error:
            log.warning("leash.sock: connection dropped", error=str(error))
            packet = None
        if packet is None:
            self._end(connection)
        elif not packet.fds or not packets.is_pidfd(packet.fds[0]):
            log.warning("leash.sock: a greeting without a pidfd")
            packet.close()
            self._end(connection)
        else:
            self._greet(connection, packet)

    def _greet(self, connection: socket.socket, packet: Packet) -> None:
        """Again from the same one: after its session broke."""
        executor = _Executor(packet.fds.pop(0), connection)
        if packet.pool_uuid != NO_POOL:
            executor.offer = packet
        else:
            packet.close()
        known = self._executors.pop(packet.executor_id, None)
        if known is not None:
            known.close()
        self._executors[packet.executor_id] = executor
        self._greeted.set()
        self._greeted = asyncio.Event()

    def _end(self, connection: socket.socket) -> None:
        asyncio.get_running_loop().remove_reader(connection)
        self._connections.discard(connection)
        connection.close()
        for executor in self._executors.values():
            if executor.connection is connection:
                executor.withdraw()


async def _readable(pidfd: int) -> None:
    """Until the process is dead."""
    loop = asyncio.get_running_loop()
    dead = loop.create_future()
    own = os.dup(pidfd)  # the greeting's may be closed meanwhile, and its number be another file's

    def settle() -> None:
        loop.remove_reader(own)
        if not dead.done():
            dead.set_result(None)

    loop.add_reader(own, settle)
    try:
        done, _ = await asyncio.wait([dead], timeout=_SAY_AFTER)
        if not done:
            log.warning("an executor attaches while the former one still dies; waiting for its work on the device")
        await dead
    finally:
        loop.remove_reader(own)
        os.close(own)
