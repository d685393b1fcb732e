"""Streams under way all the time: as soon as one ends, another one begins. Some clients misbehave."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from pagehold.v1 import inference_pb2 as api
from services.torture.bodies import Body, Trait
from services.torture.history import Deviation, History, Kind, Output
from services.torture.stream import Phase, Stream

# A stream that nothing came for in this time is lost, whatever the machine does besides.
SILENT_SECONDS: Final = 90.0
_AWAY_SECONDS: Final = 0.4  # a client that dropped its stream comes back within this time
PINS: Final = 4  # names of pinned prefixes that are in use


class Manner(Enum):
    """How a client behaves."""

    PLAIN = "plain"
    DROPS = "drops"  # breaks its stream, and resumes it
    CANCELS = "cancels"
    TWINS = "twins"  # two clients submit the same at the same time


_MANNERS: Final = (Manner.PLAIN,) * 6 + (Manner.DROPS,) * 2 + (Manner.CANCELS, Manner.TWINS)


@dataclass(slots=True)
class Counts:
    """What the load has shown so far."""

    requests: int = 0
    streams: int = 0  # checked to their end
    tokens: int = 0


class Load:
    """`streams` requests at a time, each checked against its reference."""

    def __init__(self, address: str, bodies: list[Body], seed: int, streams: int) -> None:
        self.counts = Counts()
        self.deviations: list[Deviation] = []
        self._address = address
        self._bodies = bodies
        self._references: dict[int, Sequence[Output]] = {}
        self._random = random.Random(f"load {seed}")
        self._name = f"torture-{seed}-{time.time_ns() // 1_000_000_000}"
        self._width = streams
        self._slots: list[asyncio.Task[None]] = []
        self._extra: set[asyncio.Task[None]] = set()
        self._under_way: set[Stream] = set()
        self._is_paused = False

    async def measure(self) -> None:
        """Every body once, undisturbed."""
        waiting = iter(self._bodies)

        async def slot() -> None:
            for body in waiting:
                message = body.request(f"{self._name}-reference-{body.number}")
                history = History(message.request_id, message.n or 1)
                await Stream(self._address, message, history).run()
                self.deviations += history.deviations
                self._references[body.number] = history.outputs

        await asyncio.gather(*(slot() for _ in range(self._width)))

    def start(self) -> None:
        """Fills the slots. After `measure`."""
        self._is_paused = False
        self._slots = [asyncio.create_task(self._slot()) for _ in range(self._width)]

    async def pause(self) -> None:
        """Starts nothing any more, and waits for the end of what is under way."""
        self._is_paused = True
        await asyncio.gather(*self._slots, *self._extra)

    def cancel(self) -> None:
        """Gives up."""
        for task in (*self._slots, *self._extra):
            task.cancel()

    @property
    def open(self) -> list[Stream]:
        """Streams under way."""
        return [stream for stream in self._under_way if not stream.is_over]

    @property
    def phases(self) -> set[Phase]:
        return {stream.phase for stream in self.open if not stream.is_away}

    def provoke(self, point: str) -> None:
        """Makes it likely that this failpoint is reached soon."""
        words = set(point.replace("_", ".").split("."))
        if words & {"resume", "detach"}:
            for stream in self._random.sample(self.open, min(2, len(self.open))):
                stream.drop()
        if "cancel" in words:
            self._begin_extra(self._any(Trait.SHARED), Manner.CANCELS)
        if words & {"fork", "copy"}:
            self._begin_extra(self._any(Trait.FORK), Manner.PLAIN)
            self._begin_extra(self._any(Trait.SHARED), Manner.PLAIN)
        if words & {"finish", "close", "released"}:
            self._begin_extra(self._any(Trait.SHORT), Manner.PLAIN)
        if "stop" in words:
            self._begin_extra(self._any(Trait.STOP), Manner.PLAIN)
        if "pin" in words:
            self._begin_extra(self._any(Trait.SHARED), Manner.PLAIN, pins=True)
        if words & {"preempt", "trim"}:
            for _ in range(3):
                self._begin_extra(self._any(Trait.LONG), Manner.PLAIN)
        if words & {"submit", "accept", "open", "ensure", "row", "grant"}:
            self._begin_extra(self._random.choice(self._bodies), Manner.PLAIN)

    def look(self) -> None:
        """Finds streams that nothing comes for."""
        now = time.monotonic()
        for stream in self.open:
            if now - stream.last_event > SILENT_SECONDS and not stream.is_away:
                what = f"nothing came for {SILENT_SECONDS:.0f} s in phase {stream.phase.value}"
                stream.history.deviations.append(Deviation(Kind.LOST, stream.history.request_id, what))
                self.deviations.append(stream.history.deviations[-1])

    async def _slot(self) -> None:
        while not self._is_paused:
            await self._request(self._random.choice(self._bodies), self._random.choice(_MANNERS))

    def _begin_extra(self, body: Body, manner: Manner, pins: bool = False) -> None:
        if len(self._extra) >= self._width or self._is_paused:
            return
        task = asyncio.create_task(self._request(body, manner, pins))
        self._extra.add(task)
        task.add_done_callback(self._extra.discard)

    def _any(self, trait: Trait) -> Body:
        """One that has it; of a small set that has none, any."""
        return self._random.choice([body for body in self._bodies if trait in body.traits] or self._bodies)

    async def _request(self, body: Body, manner: Manner, pins: bool = False) -> None:
        self.counts.requests += 1
        message = body.request(f"{self._name}-{self.counts.requests}")
        if pins:
            message.pin_prefix = f"torture-{body.number % PINS}"
        reference = self._references[body.number]
        length = max(len(output.tokens) for output in reference)
        at = self._random.randint(0, max(length - 2, 0))
        if manner is Manner.TWINS:
            await self._twins(body, message)
        elif manner is Manner.CANCELS and Trait.RANKED not in body.traits:
            await self._run(self._stream(body, message, cancel_at=max(at, 1)))
        elif manner is Manner.DROPS:
            await self._run(self._stream(body, message, drop_at=at))
        else:
            await self._run(self._stream(body, message))

    async def _twins(self, body: Body, message: api.GenerateRequest) -> None:
        """Two clients race with one request: the newest stream wins, and what each heard is right."""
        first, second = (self._stream(body, message, has_rival=True) for _ in range(2))
        running = asyncio.create_task(self._run(first))
        await asyncio.sleep(self._random.choice([0.0, 0.05, 0.3]))
        await self._run(second)
        await running
        if first.was_taken_over and second.was_taken_over:
            # The winner was a stream of a frontend that died since. The request itself is still there.
            await self._run(self._stream(body, message, resumes=True))

    def _stream(
        self,
        body: Body,
        message: api.GenerateRequest,
        *,
        drop_at: int | None = None,
        cancel_at: int | None = None,
        has_rival: bool = False,
        resumes: bool = False,
    ) -> Stream:
        return Stream(
            self._address,
            message,
            History(message.request_id, message.n or 1, self._references[body.number]),
            drop_at=drop_at,
            cancel_at=cancel_at,
            has_rival=has_rival,
            away_seconds=self._random.uniform(0, _AWAY_SECONDS),
            resumes=resumes,
        )

    async def _run(self, stream: Stream) -> None:
        self._under_way.add(stream)
        try:
            await stream.run()
        finally:
            self._under_way.discard(stream)
        self.counts.streams += 1
        self.counts.tokens += stream.history.tokens
        self.deviations += [one for one in stream.history.deviations if one not in self.deviations]
