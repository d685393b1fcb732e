"""The gRPC shell: one session for the attached executor, replies in the order of its calls."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import structlog

from kvmanager.service import Manager
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.kv.v1 import kv_manager_pb2_grpc as kv_grpc

log = structlog.get_logger()

Context = grpc.aio.ServicerContext


class KvManagerServicer(kv_grpc.KvManagerServiceServicer):
    """Turns run to their end on the event loop, one message at a time: no call sees half of another."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._current: object | None = None  # the session that may call

    async def Session(
        self, request_iterator: AsyncIterator[kv.SessionRequest], context: Context[kv.SessionRequest, kv.SessionResponse]
    ) -> AsyncIterator[kv.SessionResponse]:
        me = object()
        try:
            async for request in request_iterator:
                yield kv.SessionResponse(replies=[self._turn(me, call) for call in request.calls])
        finally:
            if self._current is me:
                self._current = None
                log.info("executor's session ended", epoch=self._manager.epoch)

    def _turn(self, me: object, call: kv.Call) -> kv.Reply:
        if call.WhichOneof("call") == "attach":
            reply = self._manager.attach(call.attach)
            if reply.WhichOneof("reply") == "attach":
                self._current = me  # an older session is over: its executor is dead, or this is its reconnect
                log.info("executor attached", epoch=self._manager.epoch)
            else:
                log.warning("attach refused", reason=reply.error.message)
            return reply
        if self._current is not me:
            return kv.Reply(error=kv.Error(reason=kv.ERROR_REASON_STALE_EPOCH, message="this session is over"))
        return self._manager.call(call)

    async def GetStats(
        self, request: kv.GetStatsRequest, context: Context[kv.GetStatsRequest, kv.GetStatsResponse]
    ) -> kv.GetStatsResponse:
        return self._manager.stats(self._current is not None)
