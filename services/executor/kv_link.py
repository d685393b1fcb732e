"""The executor's stream to the manager: calls out, replies back, across manager restarts.

Calls are answered in order. Whatever was not answered when the stream broke is sent again
on the next one: every call names a wanted end state, so repeating it is harmless.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from itertools import islice

import grpc
import structlog

from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.kv.v1 import kv_manager_pb2_grpc as kv_grpc
from pagehold.runtime.channel import client_options

log = structlog.get_logger()

OnReply = Callable[[kv.Call, kv.Reply], None]
OnAttach = Callable[[kv.AttachResponse], None]
OnFatal = Callable[[kv.Error], None]


class KvLink:
    """Runs on the event loop; the callbacks must be quick and must not block."""

    def __init__(
        self, address: str, attach: kv.AttachRequest, on_attach: OnAttach, on_reply: OnReply, on_fatal: OnFatal
    ) -> None:
        self._address = address
        self._attach = attach
        self._on_attach = on_attach
        self._on_reply = on_reply
        self._on_fatal = on_fatal
        self._unanswered: deque[kv.Call] = deque()
        self._unsent = 0  # how many at the right end have not been written to this stream
        self._wake = asyncio.Event()
        self.connected = False

    def send(self, calls: list[kv.Call]) -> None:
        """Queues calls; on the loop's thread."""
        self._unanswered.extend(calls)
        self._unsent += len(calls)
        self._wake.set()

    async def run(self) -> None:
        """Connects for ever; returns only when the manager refuses this executor."""
        async with grpc.aio.insecure_channel(self._address, options=client_options()) as channel:
            stub = kv_grpc.KvManagerServiceStub(channel)
            while True:
                try:
                    if not await self._session(stub):
                        return
                except grpc.aio.AioRpcError as error:
                    if self.connected:
                        log.warning("manager lost; calls are kept until it is back", code=error.code().name)
                self.connected = False
                await asyncio.sleep(0.02)

    async def _session(self, stub: kv_grpc.KvManagerServiceStub) -> bool:
        """One stream. False: the manager refused the executor for good."""
        stream = stub.Session(wait_for_ready=True)
        writer = asyncio.create_task(self._write(stream))
        try:
            attached = False
            while (response := await stream.read()) is not grpc.aio.EOF:
                for reply in response.replies:
                    failed = reply.WhichOneof("reply") == "error"
                    if failed and (not attached or reply.error.reason == kv.ERROR_REASON_STALE_EPOCH):
                        self._on_fatal(reply.error)
                        return False
                    if attached:
                        self._on_reply(self._unanswered.popleft(), reply)
                    else:
                        attached = self.connected = True
                        self._on_attach(reply.attach)
            return True
        finally:
            writer.cancel()
            stream.cancel()

    async def _write(self, stream: grpc.aio.StreamStreamCall[kv.SessionRequest, kv.SessionResponse]) -> None:
        try:
            # Replies to calls of an earlier stream never come: those calls go out again, all of them.
            self._unsent = len(self._unanswered)
            await stream.write(kv.SessionRequest(calls=[kv.Call(attach=self._attach)]))
            while True:
                while not self._unsent:
                    self._wake.clear()
                    await self._wake.wait()
                calls = list(islice(self._unanswered, len(self._unanswered) - self._unsent, None))
                self._unsent = 0
                await stream.write(kv.SessionRequest(calls=calls))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the reading side reports how the stream ended
