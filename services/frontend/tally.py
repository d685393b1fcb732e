"""What a frontend counts of its work, and tells whoever watches it."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import grpc

from pagehold.admin.v1 import admin_pb2 as admin
from pagehold.runtime.admin import AdminServicer, refuse_strangers
from services.frontend.errors import RequestError
from services.frontend.link import ExecutorLink

# Seconds to the first token: upper ends of buckets.
BOUNDS: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Tally:
    """Counts since the process started; on the event loop alone."""

    def __init__(self) -> None:
        self.ended: Counter[str] = Counter()  # answers, by the name of their status code
        self.counts = [0] * (len(BOUNDS) + 1)  # requests by seconds to their first token
        self.seconds = 0.0  # to the first token, of all of them together

    @contextmanager
    def answer(self) -> Iterator[Answer]:
        """Around one Generate or Resume, from its message to its end."""
        code = grpc.StatusCode.INTERNAL
        try:
            yield Answer(self)
            code = grpc.StatusCode.OK
        except RequestError as error:
            code = error.code
            raise
        except (asyncio.CancelledError, grpc.aio.BaseError):
            code = grpc.StatusCode.CANCELLED  # the client is gone
            raise
        finally:
            self.ended[code.name] += 1


class Answer:
    """One call, from now on."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._since = time.monotonic()

    def first_token(self) -> None:
        """It is about to be written."""
        seconds = time.monotonic() - self._since
        self._tally.counts[bisect_left(BOUNDS, seconds)] += 1
        self._tally.seconds += seconds


class TallyServicer(AdminServicer):
    """`GetTally` beside what every process answers."""

    def __init__(self, tally: Tally, link: ExecutorLink) -> None:
        self._tally = tally
        self._link = link

    async def GetTally(self, request: admin.GetTallyRequest, context: Any) -> admin.GetTallyResponse:
        await refuse_strangers(context)
        streams = self._link.streams
        return admin.GetTallyResponse(
            open=len(streams),
            waiting=sum(stream.waits for stream in streams),
            ended=self._tally.ended,
            bounds=BOUNDS,
            counts=self._tally.counts,
            seconds=self._tally.seconds,
        )
