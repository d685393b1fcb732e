"""Builds a trace while tokens arrive, inside the client of an engine, and waits for the moments of sending."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

from peers_lib.requestfile import Request
from peers_lib.trace import Arrival, Trace


@dataclass(slots=True)
class Recording:
    """One request; `submitted` is the moment when it is sent, or would be by a client that waits for nobody."""

    id: str
    submitted: float = field(default_factory=time.monotonic)
    arrivals: list[Arrival] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    def take(self, token_ids: Iterable[int]) -> None:
        """Called at once when a message comes; one without tokens is nothing."""
        ids = list(token_ids)
        if ids:
            self.arrivals.append(Arrival(time.monotonic(), len(ids)))
            self.token_ids.extend(ids)

    def trace(self) -> Trace:
        return Trace(self.id, self.submitted, tuple(self.arrivals), tuple(self.token_ids))


async def play(requests: Sequence[Request], stream: Callable[[Request, Recording], Awaitable[None]]) -> list[Trace]:
    """`stream` sends one request and records what comes; each is called at its request's time."""
    start = time.monotonic()

    async def one(request: Request) -> Trace:
        if request.at:
            await asyncio.sleep(start + request.at - time.monotonic())
        recording = Recording(request.id)
        await stream(request, recording)
        return recording.trace()

    return list(await asyncio.gather(*map(one, requests)))
