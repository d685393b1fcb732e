from __future__ import annotations

import asyncio
import time

from peers_lib.recording import Recording, play
from peers_lib.requestfile import Request
from peers_lib.trace import Trace


def test_requests_are_sent_at_their_times_and_none_waits_for_another() -> None:
    requests = [Request(name, (1,), 1, True, 0, at) for name, at in (("a", 0.0), ("b", 0.2), ("c", 0.1))]
    order: list[str] = []

    async def run() -> list[Trace]:
        all_sent = asyncio.Barrier(len(requests))

        async def stream(request: Request, recording: Recording) -> None:
            order.append(request.id)
            await all_sent.wait()
            recording.take([7])

        return await play(requests, stream)

    start = time.monotonic()
    traces = asyncio.run(run())
    assert order == ["a", "c", "b"]
    assert [trace.id for trace in traces] == ["a", "b", "c"]
    for request, trace in zip(requests, traces, strict=True):
        assert trace.submitted >= start + request.at
        assert trace.token_ids == (7,)
