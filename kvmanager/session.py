"""The gRPC shell: one session for the attached executor, replies in the order of its calls; and operators' calls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Final

import grpc
import structlog

from kvmanager.answers import error_reply
from kvmanager.device.leash import Leash
from kvmanager.errors import Refusal, Refused
from kvmanager.pins import Pin
from kvmanager.service import Manager
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.kv.v1 import kv_manager_pb2_grpc as kv_grpc
from pagehold.runtime.progress import Progress

log = structlog.get_logger()

_ATTACH_SECONDS: Final = 10.0  # making a pool may take a while
_GREETING_SECONDS: Final = 1.0  # it is sent before the attach, over another socket
_ROOM_SECONDS: Final = 5.0  # until a device that lacks memory is believed to
_ROOM_LOOK_SECONDS: Final = 0.2
_FSCK_SECONDS: Final = 120.0  # a check looks at every page and every record
_MOST_FINDINGS: Final = 1000  # in one answer

SessionContext = grpc.aio.ServicerContext[kv.SessionRequest, kv.SessionResponse]
StatsContext = grpc.aio.ServicerContext[kv.GetStatsRequest, kv.GetStatsResponse]
FsckContext = grpc.aio.ServicerContext[kv.FsckRequest, kv.FsckResponse]
ListPinsContext = grpc.aio.ServicerContext[kv.ListPinsRequest, kv.ListPinsResponse]
UnpinContext = grpc.aio.ServicerContext[kv.UnpinRequest, kv.UnpinResponse]


class KvManagerServicer(kv_grpc.KvManagerServiceServicer):
    """Turns run to their end on the event loop, one message at a time: no call sees half of another."""

    def __init__(
        self,
        manager: Manager,
        progress: Progress,
        on_fault: Callable[[Exception], None],
        leash: Leash | None = None,
        hang_seconds: float = 10.0,
    ) -> None:
        """on_fault: told of an exception that is no refusal; nothing is served from then on.

        What is derived may be half-changed then. What is stored never is: the next manager adopts it.
        leash: for pools on devices. hang_seconds: a turn, or a pause between two, that takes longer is a hang.
        """
        self._leash = leash
        self._proved = b""  # the executor that is known to be alone on the device
        self._manager = manager
        self._progress = progress
        self._hang_seconds = hang_seconds
        self._on_fault = on_fault
        self._broken = False
        self._current: object | None = None  # the session that may call
        self.changes = 0  # grows with every call that may change something
        self.findings = 0  # of the checks between calls

    async def Session(
        self, request_iterator: AsyncIterator[kv.SessionRequest], context: SessionContext
    ) -> AsyncIterator[kv.SessionResponse]:
        me = object()
        try:
            async for request in request_iterator:
                if self._leash is not None and request.calls and request.calls[0].attach.device.kind:
                    yield await self._attach_device(me, request, self._leash, context)
                else:
                    yield self._turn(me, request)
        finally:
            if self._current is me:
                self._current = None
                log.info("executor's session ended", epoch=self._manager.epoch)

    async def _attach_device(
        self, me: object, request: kv.SessionRequest, leash: Leash, context: SessionContext
    ) -> kv.SessionResponse:
        """The turn of an attach to a pool on a device: once the executor has greeted, and the former one is dead.

        Only this session waits.
        """
        attach = request.calls[0].attach
        if not await leash.greeting(attach.executor_id, _GREETING_SECONDS):
            # Its greeting may have gone to the manager before this one: it comes again.
            await context.abort(grpc.StatusCode.UNAVAILABLE, "nobody has greeted on leash.sock")
        await leash.others_gone(attach.executor_id)
        self._proved = attach.executor_id
        deadline = time.monotonic() + _ROOM_SECONDS
        while True:
            response = self._turn(me, request)
            lacks = response.replies[0].error.reason == kv.ERROR_REASON_NO_MEMORY
            if not lacks or time.monotonic() > deadline:
                break
            # What processes had that were killed a moment ago comes back a while after their death.
            await asyncio.sleep(_ROOM_LOOK_SECONDS)
        if response.replies[0].HasField("attach"):
            self._manager.hand_over(attach.executor_id, leash.hand_over)
        return response

    def _turn(self, me: object, request: kv.SessionRequest) -> kv.SessionResponse:
        self.guard()
        attaches = bool(request.calls) and request.calls[0].HasField("attach")
        self._progress.begin_turn(self._hang_seconds + (_ATTACH_SECONDS if attaches else 0.0))
        self.changes += 1
        try:
            return kv.SessionResponse(replies=[self._call(me, call) for call in request.calls])
        except Exception as error:
            self.fail(error)
            raise
        finally:
            self._progress.end_turn(next_within=self._hang_seconds)

    def _call(self, me: object, call: kv.Call) -> kv.Reply:
        if call.HasField("attach"):
            return self._attach(me, call.attach)
        if self._current is not me:
            return error_reply(Refused(Refusal.STALE_EPOCH, "this session is not attached, or another one is since"))
        return self._manager.call(call)

    def _attach(self, me: object, request: kv.AttachRequest) -> kv.Reply:
        leash = self._leash
        if leash is None or not request.device.kind:
            reply = self._manager.attach(request)
        elif request.executor_id == self._proved:
            reply = self._manager.attach(request, lambda pool: leash.take_offer(request.executor_id, pool))
        else:
            reply = error_reply(Refused(Refusal.STALE_EPOCH, "attach comes first, and after a greeting on leash.sock"))
        if reply.HasField("attach"):
            # An older session is over: its executor is dead, or this is the same one again.
            self._current = me
            log.info("executor attached", epoch=reply.attach.epoch, pages=reply.attach.pages)
        else:
            log.warning("attach refused", reason=reply.error.message)
        return reply

    async def GetStats(self, request: kv.GetStatsRequest, context: StatsContext) -> kv.GetStatsResponse:
        self.guard()
        stats = self._manager.stats(self._current is not None)
        stats.integrity_findings = self.findings
        return stats

    async def Fsck(self, request: kv.FsckRequest, context: FsckContext) -> kv.FsckResponse:
        self.guard()
        self._progress.begin_turn(_FSCK_SECONDS)
        try:
            report = self._manager.fsck()
        finally:
            self._progress.end_turn(next_within=self._hang_seconds)
        return kv.FsckResponse(
            findings=[kv.Finding(kind=one.kind.name, message=str(one)) for one in report.findings[:_MOST_FINDINGS]],
            total=len(report.findings),
            pages=report.pages,
            rows=report.rows,
            records=report.records,
        )

    async def ListPins(self, request: kv.ListPinsRequest, context: ListPinsContext) -> kv.ListPinsResponse:
        self.guard()
        core = self._manager.core
        size = core.page_size if core is not None else 0
        pins = [
            kv.Pin(name=one.pin.name, tenant=one.pin.tenant, pages=one.pages, tokens=one.pages * size)
            for one in self._manager.pins()
        ]
        return kv.ListPinsResponse(pins=pins)

    async def Unpin(self, request: kv.UnpinRequest, context: UnpinContext) -> kv.UnpinResponse:
        self.guard()
        self.changes += 1
        try:
            return kv.UnpinResponse(existed=self._manager.unpin(Pin(request.tenant, request.name)))
        except Exception as error:
            self.fail(error)
            raise

    def guard(self) -> None:
        if self._broken:
            raise RuntimeError("the manager is going down")

    def fail(self, error: Exception) -> None:
        self._broken = True
        self._on_fault(error)
