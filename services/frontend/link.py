"""The frontend's one stream to the executor, kept up for ever.

After every reconnect all open streams are told again: those not accepted yet are submitted, the
others attached at the next offset that they expect, stop strings found and cancels repeated. The
executor's answers are idempotent, so nothing here needs to know what got through before the break.

While the executor is away, a client that goes away takes its request with it if its grace is 0.
Any other grace cannot be told: the executor gives such requests the 30 s of a lost frontend.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any, Final

import grpc
import structlog

from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.executor.v1 import executor_pb2_grpc as ex_grpc
from pagehold.runtime import channel, failpoint
from pagehold.runtime.protocol import PROTOCOL, skew
from pagehold.v1 import inference_pb2 as api
from services.frontend.clientstream import ClientStream
from services.frontend.errors import from_failure, unavailable
from services.frontend.tokenizer import ModelTokenizer
from services.frontend.validation import ServedModel

log = structlog.get_logger()

TENANT: Final = "default"
LOST_GRACE: Final = 30.0  # seconds; a stream that breaks through us is detached as if we had died
_RETRY_SECONDS: Final = 0.01
_FAULT_SECONDS: Final = 1.0
_REPEAT_SECONDS: Final = 10.0  # a cancel sent this long before a break has arrived
_MOST_CANCELS: Final = 65_536
_LONGEST_TIMEOUT_MS: Final = 1 << 32  # 49 days
_TOKENS_AT_ONCE: Final = 512  # fed before other streams get a turn: a resumed crowd has much to replay


class SkewError(Exception):
    """The executor's version of the messages is not ours, nor next to it; the message says what to do."""


class ExecutorLink:
    """`model` is what the executor last described; None until then."""

    def __init__(self, address: str, on_change: Callable[[], None], hang_seconds: float = 10.0) -> None:
        """hang_seconds: of silence, until the executor counts as away."""
        self._address = address
        self._on_change = on_change
        self._options = channel.client_options(hang_seconds)
        self._hang_seconds = hang_seconds
        self._outgoing: asyncio.Queue[ex.ConnectRequest] = asyncio.Queue()
        self._streams: dict[int, ClientStream] = {}
        self._cancels: dict[str, float] = {}  # by request id: when it was sent; infinity: not yet
        self._lost_at = 0.0
        self._next_id = 0
        self._stub: ex_grpc.ExecutorServiceStub | None = None
        self.model: ServedModel | None = None
        self.connected = False

    def served(self) -> ServedModel:
        """Raises RequestError until the first executor has come."""
        if self.model is None:
            raise unavailable("no executor is ready yet; try again in a moment")
        return self.model

    def next_id(self) -> int:
        self._next_id += 1
        return self._next_id

    @property
    def streams(self) -> list[ClientStream]:
        return list(self._streams.values())

    def open(self, stream: ClientStream) -> None:
        """Submits or attaches the stream, now or when the executor is there."""
        self._streams[stream.stream_id] = stream
        if self.connected:
            self._introduce(stream)

    def close(self, stream: ClientStream, gone: bool) -> None:
        """The stream is over. `gone`: by its client's will, which says what becomes of the request."""
        if self._streams.pop(stream.stream_id, None) is None or stream.finished:
            return
        failpoint.hit("frontend.detach.before")
        grace = stream.detach_grace if gone else max(stream.detach_grace, LOST_GRACE)
        if self.connected:
            self._send(ex.ConnectRequest(detach=ex.Detach(stream_id=stream.stream_id, grace_ms=int(grace * 1000))))
        elif grace == 0 and all(other.request_id != stream.request_id for other in self.streams):
            self.cancel(stream.request_id)

    def cancel(self, request_id: str) -> None:
        """Ends the request, wherever it is read; repeated until it must have arrived."""
        for stream in self._streams.values():
            stream.cancelled = stream.cancelled or stream.request_id == request_id
        self._cancels.pop(request_id, None)
        if self.connected:
            self._cancels = _after(self._cancels, time.monotonic() - _REPEAT_SECONDS)
            self._send_cancel(request_id)
        else:
            self._cancels[request_id] = math.inf
        if len(self._cancels) > _MOST_CANCELS:
            del self._cancels[next(iter(self._cancels))]

    async def load(self) -> ex.GetLoadResponse:
        """Raises AioRpcError when the executor is away."""
        if self._stub is None:
            return ex.GetLoadResponse()
        load: ex.GetLoadResponse = await self._stub.GetLoad(ex.GetLoadRequest(), timeout=2)
        return load

    async def run(self) -> None:
        """Connects for ever."""
        # What is asked now and then has a channel of its own: it outlives the sessions.
        async with grpc.aio.insecure_channel(self._address, options=self._options) as asking:
            self._stub = ex_grpc.ExecutorServiceStub(asking)
            while True:
                await channel.listening(self._address)
                await asyncio.sleep(await self._visit())

    async def _visit(self) -> float:
        """One executor from its first answer to its last. Returns the seconds until the next attempt."""
        try:
            async with grpc.aio.insecure_channel(self._address, options=self._options) as way:
                stub = ex_grpc.ExecutorServiceStub(way)
                asked = ex.DescribeRequest(protocol=PROTOCOL)
                await self._learn(await stub.Describe(asked, wait_for_ready=True))
                await self._session(stub)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return _RETRY_SECONDS
            # It is there, but no executor of ours.
            log.warning("the executor does not say what it serves", code=error.code().name, reason=error.details())
        except SkewError as error:
            log.error("this executor cannot be used", reason=str(error))
        except failpoint.FailpointError:
            raise  # no fault of the executor's: it would come again for ever
        except Exception:
            log.exception("the executor's answer makes no sense; connecting again")
        else:
            return _RETRY_SECONDS
        return _FAULT_SECONDS

    async def _learn(self, described: ex.DescribeResponse) -> None:
        if wrong := skew("frontend", "executor", described.protocol):
            raise SkewError(wrong)
        known = self.model
        if known is None or known.described.fingerprint != described.fingerprint:
            tokenizer = await asyncio.to_thread(ModelTokenizer, described)
            log.info("model", name=described.served_model_name, max_model_len=described.max_model_len)
        else:
            tokenizer = known.tokenizer
        described.ClearField("tokenizer_json")  # the tokenizer has it
        self.model = ServedModel(described, tokenizer)

    async def _session(self, stub: ex_grpc.ExecutorServiceStub) -> None:
        call = stub.Connect()
        self._outgoing = asyncio.Queue()
        self._begin()
        writer = asyncio.create_task(self._write(call, self._outgoing))
        reader = asyncio.create_task(self._read(call))
        asker = asyncio.create_task(self._ask(stub))
        self.connected = True
        self._on_change()
        try:
            ended, _ = await asyncio.wait((reader, asker), return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()
        finally:
            self.connected = False
            self._lost_at = time.monotonic()
            for task in (writer, reader, asker):
                task.cancel()
            call.cancel()
            self._on_change()
        log.warning("executor lost; streams wait for the next one", streams=len(self._streams))

    async def _read(self, call: Any) -> None:
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                await self._dispatch(message)
        except grpc.aio.AioRpcError:
            pass  # the same as the end

    async def _ask(self, stub: ex_grpc.ExecutorServiceStub) -> None:
        """Until the executor leaves a question without an answer: then it is stopped, or as good as.

        A question of ours, for gRPC's own pings do not find that over a Unix socket.
        """
        while True:
            await asyncio.sleep(self._hang_seconds / 2)
            try:
                await stub.GetLoad(ex.GetLoadRequest(), timeout=self._hang_seconds / 2)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    log.warning("the executor does not answer", seconds=self._hang_seconds)
                    return

    def _begin(self) -> None:
        """Tells the executor everything that it may not know."""
        # First the cancels: they do not mean a request that was opened under the same id since.
        self._cancels = _after(self._cancels, self._lost_at - _REPEAT_SECONDS)
        for request_id in list(self._cancels):
            self._send_cancel(request_id)
        for stream in self._streams.values():
            if stream.accepted is not None:
                stream.notice(api.NOTICE_KIND_RECOVERED, "the executor was replaced; the stream goes on")
            failpoint.hit("frontend.introduce.before")
            self._introduce(stream)
            if stream.cancelled:
                self._send_cancel(stream.request_id)
            for output in stream.outputs:
                if output.stopped and output.ended is None:
                    self._send_stop(stream, output.index)

    async def _write(
        self,
        call: grpc.aio.StreamStreamCall[ex.ConnectRequest, ex.ConnectResponse],
        outgoing: asyncio.Queue[ex.ConnectRequest],
    ) -> None:
        try:
            while True:
                await call.write(await outgoing.get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the reading side reports how the stream ended

    # --- to the executor ---

    def _send(self, message: ex.ConnectRequest) -> None:
        self._outgoing.put_nowait(message)

    def _introduce(self, stream: ClientStream) -> None:
        if not stream.cancelled:
            self._cancels.pop(stream.request_id, None)  # an older wish, sent before and not to be repeated
        if stream.submit is not None:
            stream.submit.timeout_ms = _timeout_ms(stream.deadline)
            self._send(ex.ConnectRequest(submit=stream.submit))
            return
        attach = ex.Attach(
            stream_id=stream.stream_id, tenant=TENANT, request_id=stream.request_id, describe=stream.describe
        )
        wanted = stream.positions if stream.describe else {o.index: o.received for o in stream.outputs}
        for index, offset in wanted.items():
            attach.positions.add(index=index, offset=offset)
        self._send(ex.ConnectRequest(attach=attach))

    def _send_cancel(self, request_id: str) -> None:
        self._cancels.pop(request_id, None)  # the order of the dict is that of the times
        self._cancels[request_id] = time.monotonic()
        self._send(ex.ConnectRequest(cancel=ex.Cancel(tenant=TENANT, request_id=request_id)))

    def _send_stop(self, stream: ClientStream, index: int) -> None:
        failpoint.hit("frontend.stop_at.before")
        length = stream.outputs[index].received
        stop = ex.StopAt(tenant=TENANT, request_id=stream.request_id, index=index, length=length)
        self._send(ex.ConnectRequest(stop_at=stop))

    # --- from the executor ---

    async def _dispatch(self, message: ex.ConnectResponse) -> None:
        failpoint.hit("frontend.received.before")
        for accepted in message.accepted:
            if (stream := self._streams.get(accepted.stream_id)) is not None:
                stream.accept(accepted.prompt_tokens, accepted.cached_tokens)
                if stream.cancelled:  # maybe before the executor knew the request
                    self._send_cancel(stream.request_id)
        for record in message.records:
            if (stream := self._streams.get(record.stream_id)) is not None:
                stream.take_record(record)
        for stream_id in message.recomputed:
            if (stream := self._streams.get(stream_id)) is not None:
                stream.notice(api.NOTICE_KIND_RECOMPUTED, "pages were lost and are computed again; the stream goes on")
        # Before the tokens: with an output's last token it must be known that it is the last.
        for ended in message.ended:
            if (stream := self._streams.get(ended.stream_id)) is not None:
                stream.end(ended)
        await self._dispatch_tokens(message.tokens)
        failpoint.hit("frontend.received.after")
        for failed in message.failed:
            # At once: a stream that was taken over must not be introduced again.
            if (stream := self._streams.pop(failed.stream_id, None)) is not None:
                stream.fail(from_failure(failed))

    async def _dispatch_tokens(self, run: ex.StepTokens) -> None:
        taken = fed = 0
        for stream_id, index, offset, count in zip(run.stream_ids, run.indexes, run.offsets, run.counts, strict=True):
            first, taken = taken, taken + count
            stream = self._streams.get(stream_id)
            if stream is None:
                continue
            if fed + count > _TOKENS_AT_ONCE:
                await asyncio.sleep(0)
                fed = 0
            fed += count
            logprobs = run.logprobs[first:taken] if stream.wants_logprobs else []
            if stream.tokens(index, offset, list(run.token_ids[first:taken]), list(logprobs)):
                self._send_stop(stream, index)
            if stream.error is not None:
                # Its handler may be stuck in a write: nothing more is to pile up for it.
                self.close(stream, gone=False)


def _after(times: dict[str, float], horizon: float) -> dict[str, float]:
    return {key: at for key, at in times.items() if at > horizon}


def _timeout_ms(deadline: float | None) -> int:
    """What remains of it now, however often the request was submitted before. 0: no deadline."""
    if deadline is None:
        return 0
    return min(max(int((deadline - time.monotonic()) * 1000), 1), _LONGEST_TIMEOUT_MS)
