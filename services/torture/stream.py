"""One client of one request, over as many streams as it takes. Every event goes into the history.

Only what `pagehold.Client` hides from its user is followed by another stream; any other status is a deviation.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

import grpc

from pagehold.v1 import inference_pb2 as api
from pagehold.v1 import inference_pb2_grpc as api_grpc
from services.torture.history import Deviation, History, Kind

_RETRY_SECONDS: Final = 0.02
_REMEMBERED: Final = 4096  # token times

_OPTIONS: Final = [
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 10_000),  # how long one attempt may take
    ("grpc.max_reconnect_backoff_ms", 200),
    # A connection of its own for each stream: where it ends up says which frontend dies with it.
    ("grpc.use_local_subchannel_pool", 1),
]


class Phase(Enum):
    """Where a stream stands, as its client can tell."""

    OPENING = "open"  # sent, not accepted
    PREFILL = "prefill"  # accepted, no token yet
    FORK = "fork"  # accepted, some of several outputs without a token
    DECODE = "decode"
    RESUMING = "resume"  # sent again
    OVER = "over"


@dataclass(slots=True)
class Marks:
    """When things happened to a stream, CLOCK_MONOTONIC seconds, the latest ones."""

    tokens: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    notices: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    breaks: deque[float] = field(default_factory=lambda: deque(maxlen=64))


class Stream:
    """A client that comes back whenever its stream breaks."""

    def __init__(
        self,
        address: str,
        message: api.GenerateRequest,
        history: History,
        *,
        drop_at: int | None = None,
        cancel_at: int | None = None,
        has_rival: bool = False,
        away_seconds: float = 0.0,
        resumes: bool = False,
    ) -> None:
        """drop_at: tokens after which the client goes away for a while; 0: as soon as it has sent the request.

        cancel_at: tokens after which it cancels. has_rival: another client has the same request, and one of the
        two is told so. resumes: the request is there already.
        """
        self.history = history
        self.marks = Marks()
        self.last_event = time.monotonic()
        self.is_away = False
        self.was_taken_over = False
        self.is_ranked = message.best_of > (message.n or 1)
        self._address = address
        self._message = message
        self._drop_at = drop_at
        self._cancel_at = cancel_at
        self._has_rival = has_rival
        self._away_seconds = away_seconds
        self._was_accepted = resumes
        self._is_accepted_here = False
        self._broken = 0  # streams of its own that may still be on their way to the executor
        self._call: Any = None

    @property
    def is_over(self) -> bool:
        return self.history.is_over or self.was_taken_over or bool(self.history.deviations)

    @property
    def phase(self) -> Phase:
        if self.is_over:
            return Phase.OVER
        if not self._is_accepted_here:
            return Phase.RESUMING if self._was_accepted else Phase.OPENING
        if not self.history.tokens:
            return Phase.PREFILL if len(self.history.outputs) == 1 else Phase.FORK
        return Phase.DECODE if all(output.tokens for output in self.history.outputs) else Phase.FORK

    def drop(self) -> None:
        """The client goes away now, and comes back."""
        if self._call is not None and self._drop_at is None:
            self._drop_at = self.history.tokens
            self._call.cancel()

    async def run(self) -> None:
        """To the end of the request, or to the first deviation."""
        while not self.is_over:
            async with grpc.aio.insecure_channel(self._address, options=_OPTIONS) as channel:
                stub = api_grpc.InferenceServiceStub(channel)
                try:
                    await self._read(stub)
                except grpc.aio.AioRpcError as error:
                    self.marks.breaks.append(time.monotonic())
                    if not self._may_retry(error):
                        self._report(f"{error.code().name}: {error.details()}")
                except asyncio.CancelledError:
                    if self._drop_at is None or self._drop_at > self.history.tokens:
                        raise  # it is we who are cancelled
                    self._broken += 1
                finally:
                    self._call = None
            if self._drop_at is not None and self._drop_at <= self.history.tokens and not self.is_over:
                await self._go_away()
            elif not self.is_over:
                await asyncio.sleep(_RETRY_SECONDS)

    async def _read(self, stub: Any) -> None:
        self._is_accepted_here = False
        self.history.begin_stream()
        if self._was_accepted:
            again = api.ResumeRequest(request_id=self._message.request_id)
            for index, offset in self.history.offsets.items():
                again.positions.add(index=index, offset=offset)
            self._call = stub.Resume(again)
        else:
            self._call = stub.Generate(self._message)
        call = self._call
        if self._drop_at == 0:
            await call.wait_for_connection()
            call.cancel()
        async for response in call:
            self._take(response)
            if self.history.deviations:
                call.cancel()
                return
            if self._cancel_at is not None and self.history.tokens >= self._cancel_at:
                await self._cancel(stub)
            if self._drop_at is not None and self.history.tokens >= self._drop_at and not self.is_over:
                call.cancel()
        self.history.end_stream()

    def _take(self, response: api.GenerateResponse) -> None:
        self.last_event = time.monotonic()
        self.history.take(response)
        match response.WhichOneof("event"):
            case "accepted":
                self._was_accepted = self._is_accepted_here = True
            case "tokens":
                self.marks.tokens.append(self.last_event)
            case "notice":
                self.marks.notices.append(self.last_event)

    async def _cancel(self, stub: Any) -> None:
        self._cancel_at = None
        self.history.may_be_cut = True
        try:
            await stub.Cancel(api.CancelRequest(request_id=self._message.request_id), timeout=5)
        except grpc.aio.AioRpcError as error:
            # A frontend that dies takes the wish with it; then the request goes on to its end.
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                self._report(f"Cancel: {error.code().name}: {error.details()}")

    async def _go_away(self) -> None:
        self._drop_at = None
        self.is_away = True
        await asyncio.sleep(self._away_seconds)
        self.is_away = False
        self.last_event = time.monotonic()

    def _may_retry(self, error: grpc.aio.AioRpcError) -> bool:
        """The same cases as in `pagehold.Client`."""
        code = error.code()
        if code is grpc.StatusCode.ABORTED and self._broken > 0:
            self._broken -= 1  # by a stream of its own, whose frontend passed it on after it came back elsewhere
            return True
        if code is grpc.StatusCode.ABORTED and self._has_rival:
            self.was_taken_over = True
            return True
        slow = self._was_accepted and code is grpc.StatusCode.RESOURCE_EXHAUSTED
        self._broken += 1
        return code is grpc.StatusCode.UNAVAILABLE or slow

    def _report(self, what: str) -> None:
        self.history.deviations.append(Deviation(Kind.STATUS, self.history.request_id, what))
