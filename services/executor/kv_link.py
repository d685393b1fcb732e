"""The executor's stream to the manager: calls out, replies back, across manager restarts.

Calls are answered in order. Whatever was not answered when the stream broke is sent again
on the next one: every call names a wanted end state, so repeating it is harmless.

    _unanswered   [ written, no answer yet | not yet written ]
                                             `_unsent` at the right end
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from itertools import islice
from typing import Final

import grpc
import structlog

from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.kv.v1 import kv_manager_pb2_grpc as kv_grpc
from pagehold.runtime import channel, failpoint

log = structlog.get_logger()

# A turn of the manager stays short, and a message small, whatever piled up while the manager was away.
_MOST_CALLS: Final = 256
_MOST_BYTES: Final = 8 << 20
_RETRY_SECONDS: Final = 0.02

Attach = Callable[[], Awaitable[kv.AttachRequest]]  # asked before each attach
OnReply = Callable[[kv.Call, kv.Reply], None]
OnAttach = Callable[[kv.AttachResponse], None]
OnFatal = Callable[[kv.Error], None]
Stream = grpc.aio.StreamStreamCall[kv.SessionRequest, kv.SessionResponse]


class ProtocolError(Exception):
    """The manager answered what it was not asked: going on would tell one sequence another's news."""


class KvLink:
    """Runs on the event loop; the callbacks must be quick and must not block."""

    def __init__(
        self,
        address: str,
        attach: Attach,
        on_attach: OnAttach,
        on_reply: OnReply,
        on_fatal: OnFatal,
        hang_seconds: float = 10.0,
    ) -> None:
        """hang_seconds: of silence, until the manager counts as away."""
        self._address = address
        self._attach = attach
        self._on_attach = on_attach
        self._on_reply = on_reply
        self._on_fatal = on_fatal
        self._options = channel.client_options(hang_seconds)
        self._unanswered: deque[kv.Call] = deque()
        self._unsent = 0
        self._wake = asyncio.Event()
        self.connected = False

    def send(self, calls: list[kv.Call]) -> None:
        """Queues calls; on the loop's thread."""
        self._unanswered.extend(calls)
        self._unsent += len(calls)
        self._wake.set()

    async def run(self) -> None:
        """Connects for ever; returns only when the manager refuses this executor. Raises ProtocolError."""
        while True:
            code = "OK"
            await channel.listening(self._address)
            try:
                async with grpc.aio.insecure_channel(self._address, options=self._options) as way:
                    if not await self._session(kv_grpc.KvManagerServiceStub(way)):
                        return
            except grpc.aio.AioRpcError as error:
                code = error.code().name
            if self.connected:
                log.warning("manager lost; calls are kept until it is back", code=code)
            self.connected = False
            await asyncio.sleep(_RETRY_SECONDS)

    async def _session(self, stub: kv_grpc.KvManagerServiceStub) -> bool:
        """One stream. False: the manager refused the executor for good."""
        stream = stub.Session(wait_for_ready=True)
        # Replies to calls of an earlier stream never come: those calls go out again, all of them.
        self._unsent = len(self._unanswered)
        reading = asyncio.create_task(self._read(stream))
        writing = asyncio.create_task(self._write(stream))
        try:
            await asyncio.wait((reading, writing), return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()  # raises what is not about the stream
            return await reading
        finally:
            stream.cancel()
            for task in (reading, writing):
                task.cancel()
            # The next stream's writer must not meet this one's.
            await asyncio.gather(reading, writing, return_exceptions=True)

    async def _read(self, stream: Stream) -> bool:
        attached = False
        while isinstance(response := await stream.read(), kv.SessionResponse):
            for reply in response.replies:
                failed = reply.WhichOneof("reply") == "error"
                if failed and (not attached or reply.error.reason == kv.ERROR_REASON_STALE_EPOCH):
                    self._on_fatal(reply.error)
                    return False
                if attached:
                    self._answer(reply)
                elif reply.HasField("attach"):
                    attached = self.connected = True
                    failpoint.hit("executor.attach.after")
                    self._on_attach(reply.attach)
                else:
                    raise ProtocolError("the first reply does not answer `attach`")
        return True

    def _answer(self, reply: kv.Reply) -> None:
        if len(self._unanswered) == self._unsent:
            raise ProtocolError("a reply without a call")
        call = self._unanswered.popleft()
        if reply.WhichOneof("reply") not in ("error", call.WhichOneof("call")):
            raise ProtocolError(f"`{call.WhichOneof('call')}` was answered with `{reply.WhichOneof('reply')}`")
        self._on_reply(call, reply)

    async def _write(self, stream: Stream) -> None:
        try:
            failpoint.hit("executor.attach.before")
            await stream.write(kv.SessionRequest(calls=[kv.Call(attach=await self._attach())]))
            while True:
                while not self._unsent:
                    self._wake.clear()
                    await self._wake.wait()
                await stream.write(kv.SessionRequest(calls=self._next()))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the reading side reports how the stream ended

    def _next(self) -> list[kv.Call]:
        """The calls of the next message: they count as written from here on."""
        first, nbytes = len(self._unanswered) - self._unsent, 0
        calls: list[kv.Call] = []
        for call in islice(self._unanswered, first, first + _MOST_CALLS):
            nbytes += call.ByteSize()
            if calls and nbytes > _MOST_BYTES:
                break
            calls.append(call)
        self._unsent -= len(calls)
        return calls
