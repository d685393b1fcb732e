"""The network between processes: in order on each stream, late, and gone in the middle when the stream breaks."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from tests.faults.simulator.messages.loop import Process, VirtualLoop

if TYPE_CHECKING:
    from tests.faults.simulator.messages.calls import Server, Stream

_WINDOW = 6  # messages that are sent and not read, until the sender is held up


@dataclass(frozen=True, slots=True)
class End:
    """The last item of a direction."""

    code: grpc.StatusCode
    details: str = ""

    def error(self) -> grpc.aio.AioRpcError:
        return grpc.aio.AioRpcError(self.code, grpc.aio.Metadata(), grpc.aio.Metadata(), self.details)


class Network:
    """Who listens where, and which streams are open."""

    def __init__(self, loop: VirtualLoop, rng: random.Random) -> None:
        self.loop = loop
        self.rng = rng
        self.wires = Process(loop, "network")  # what no process's death takes along
        self._servers: dict[str, list[Server]] = {}
        self.streams: dict[Stream, None] = {}  # in the order of their opening
        self.messages = 0
        self.client_breaks = 0  # of streams between clients and frontends
        self.lost = 0

    def delay(self) -> float:
        """Seconds: mostly a millisecond, now and then long enough to be overtaken by a restart."""
        chance = self.rng.random()
        if chance < 0.93:
            return self.rng.uniform(0.0001, 0.002)
        return self.rng.uniform(0.002, 0.03) if chance < 0.99 else self.rng.uniform(0.03, 0.5)

    def listen(self, address: str, server: Server) -> None:
        self._servers.setdefault(address, []).append(server)
        server.process.on_death.append(lambda: self._servers[address].remove(server))

    def find(self, address: str) -> Server | None:
        """One of those that listen there."""
        servers = self._servers.get(address)
        return self.rng.choice(servers) if servers else None

    def attach(self, process: Process) -> None:
        """Its streams break when it dies."""

        def cut() -> None:
            for stream in [stream for stream in self.streams if process in stream.ends]:
                stream.cut()

        process.on_death.append(cut)

    def open_streams(self, path: str) -> list[Stream]:
        return [stream for stream in self.streams if stream.path.endswith(path)]


class Pipe:
    """One direction of one stream; one reader, one writer."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._flying: deque[bytes | End] = deque()
        self._items: deque[bytes | End] = deque()  # arrived, and not taken
        self._unread = 0  # sent, and not taken
        self._last = 0.0
        self._cut = False
        self._arrived = asyncio.Event()
        self._taken = asyncio.Event()

    async def room(self) -> None:
        while self._unread >= _WINDOW and not self._cut:
            self._taken.clear()
            await self._taken.wait()

    def send(self, item: bytes | End) -> None:
        if self._cut:
            return
        network = self._network
        network.messages += 1
        self._unread += 1
        self._last = max(self._last, network.loop.time() + network.delay())
        self._flying.append(item)
        network.loop.call_at(self._last, self._arrive)

    def _arrive(self) -> None:
        """The oldest that is on its way: two that are due at one time keep their order."""
        item = self._flying.popleft()
        if self._cut:
            self._network.lost += 1
            return
        self._items.append(item)
        self._arrived.set()

    def cut(self, end: End) -> None:
        """What is on its way is lost; of what has arrived the reader may get some, and then the end."""
        self._cut = True
        self._taken.set()
        while self._items and self._network.rng.random() < 0.5:
            self._items.pop()
            self._network.lost += 1
        self._network.loop.call_later(self._network.delay(), self._finish, end)

    def _finish(self, end: End) -> None:
        self._items.append(end)
        self._arrived.set()

    async def receive(self) -> bytes | End:
        """The next item; an end stays."""
        while not self._items:
            self._arrived.clear()
            await self._arrived.wait()
        item = self._items[0]
        if not isinstance(item, End):
            self._items.popleft()
            self._unread -= 1
            self._taken.set()
        return item
