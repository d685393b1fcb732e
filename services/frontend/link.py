"""The frontend's one stream to the executor, kept up for ever.

After every reconnect all open streams are told again: those not accepted yet are submitted, the
others attached at the next offset that they expect. The executor's answers are idempotent, so
nothing here needs to know what got through before the break.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import grpc
import structlog

from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.executor.v1 import executor_pb2_grpc as ex_grpc
from pagehold.runtime.channel import client_options
from pagehold.v1 import inference_pb2 as api
from services.frontend.clientstream import ClientStream
from services.frontend.errors import from_failure
from services.frontend.tokenizer import ModelTokenizer
from services.frontend.validation import ServedModel

log = structlog.get_logger()

TENANT: Final = "default"
_RETRY_SECONDS: Final = 0.03
_REPEAT_SECONDS: Final = 10.0  # cancels and stops of the last seconds are sent again after a break
_MOST_REPEATED: Final = 4096


class ExecutorLink:
    """`model` is what the executor last described; None until then."""

    def __init__(self, address: str, on_change: Callable[[], None]) -> None:
        self._address = address
        self._on_change = on_change
        self._outgoing: asyncio.Queue[ex.ConnectRequest] = asyncio.Queue()
        self._streams: dict[int, ClientStream] = {}
        self._recent: deque[tuple[float, ex.ConnectRequest]] = deque(maxlen=_MOST_REPEATED)
        self._next_id = 0
        self._stub: ex_grpc.ExecutorServiceStub | None = None
        self.model: ServedModel | None = None
        self.connected = False

    def next_id(self) -> int:
        self._next_id += 1
        return self._next_id

    @property
    def open_streams(self) -> int:
        return len(self._streams)

    @property
    def streams(self) -> list[ClientStream]:
        return list(self._streams.values())

    def open(self, stream: ClientStream) -> None:
        """Submits or attaches the stream, now or when the executor is there."""
        self._streams[stream.stream_id] = stream
        if self.connected:
            self._outgoing.put_nowait(self._introduce(stream))

    def close(self, stream: ClientStream, grace_seconds: float) -> None:
        """The client is gone or served; `grace_seconds` counts only for a request that goes on."""
        self._streams.pop(stream.stream_id, None)
        if stream.done and stream.error is None:
            return
        grace_ms = int(grace_seconds * 1000)
        if self.connected:
            detach = ex.Detach(stream_id=stream.stream_id, grace_ms=grace_ms)
            self._outgoing.put_nowait(ex.ConnectRequest(detach=detach))
        elif grace_ms == 0:
            self.cancel(stream.request_id)

    def cancel(self, request_id: str) -> None:
        self._repeatable(ex.ConnectRequest(cancel=ex.Cancel(tenant=TENANT, request_id=request_id)))

    def _stop_at(self, request_id: str, index: int, length: int) -> None:
        stop = ex.StopAt(tenant=TENANT, request_id=request_id, index=index, length=length)
        self._repeatable(ex.ConnectRequest(stop_at=stop))

    def _repeatable(self, message: ex.ConnectRequest) -> None:
        self._recent.append((time.monotonic(), message))
        if self.connected:
            self._outgoing.put_nowait(message)

    async def load(self) -> ex.GetLoadResponse:
        """Raises AioRpcError when the executor is away."""
        if self._stub is None:
            return ex.GetLoadResponse()
        return await self._stub.GetLoad(ex.GetLoadRequest(), timeout=2)

    async def run(self) -> None:
        """Connects for ever."""
        async with grpc.aio.insecure_channel(self._address, options=client_options()) as channel:
            self._stub = ex_grpc.ExecutorServiceStub(channel)
            while True:
                try:
                    described = await self._stub.Describe(ex.DescribeRequest(), wait_for_ready=True)
                    await self._learn(described)
                    await self._session(self._stub)
                except grpc.aio.AioRpcError as error:
                    if self.connected:
                        log.warning("executor lost; streams wait for the next one", code=error.code().name)
                if self.connected:
                    self.connected = False
                    self._on_change()
                await asyncio.sleep(_RETRY_SECONDS)

    async def _learn(self, described: ex.DescribeResponse) -> None:
        known = self.model
        if known is None or known.described.fingerprint != described.fingerprint:
            tokenizer = await asyncio.to_thread(ModelTokenizer, described)
            log.info("model", name=described.served_model_name, max_model_len=described.max_model_len)
        else:
            tokenizer = known.tokenizer
        described.ClearField("tokenizer_json")  # the tokenizer has it
        self.model = ServedModel(described, tokenizer)

    async def _session(self, stub: ex_grpc.ExecutorServiceStub) -> None:
        stream = stub.Connect()
        self._outgoing = asyncio.Queue()
        horizon = time.monotonic() - _REPEAT_SECONDS
        for client in self._streams.values():
            if client.is_accepted:
                client.notice(api.NOTICE_KIND_RECOVERED, "the executor was replaced; the stream goes on")
            self._outgoing.put_nowait(self._introduce(client))
        for at, message in self._recent:
            if at > horizon:
                self._outgoing.put_nowait(message)
        writer = asyncio.create_task(self._write(stream, self._outgoing))
        self.connected = True
        self._on_change()
        try:
            while (message := await stream.read()) is not grpc.aio.EOF:
                self._dispatch(message)
        finally:
            writer.cancel()
            stream.cancel()

    async def _write(
        self,
        stream: grpc.aio.StreamStreamCall[ex.ConnectRequest, ex.ConnectResponse],
        outgoing: asyncio.Queue[ex.ConnectRequest],
    ) -> None:
        try:
            while True:
                await stream.write(await outgoing.get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the reading side reports how the stream ended

    def _introduce(self, stream: ClientStream) -> ex.ConnectRequest:
        if stream.submit is not None:
            return ex.ConnectRequest(submit=stream.submit)
        attach = ex.Attach(
            stream_id=stream.stream_id, tenant=TENANT, request_id=stream.request_id, describe=stream.describe
        )
        wanted = stream.positions if stream.describe else {o.index: o.received for o in stream.outputs}
        for index, offset in wanted.items():
            attach.positions.add(index=index, offset=offset)
        return ex.ConnectRequest(attach=attach)

    def _dispatch(self, message: ex.ConnectResponse) -> None:
        for failed in message.failed:
            if (stream := self._streams.get(failed.stream_id)) is not None:
                stream.fail(from_failure(failed))
        for accepted in message.accepted:
            if (stream := self._streams.get(accepted.stream_id)) is not None:
                stream.accept(accepted.prompt_tokens, accepted.cached_tokens)
        for record in message.records:
            if (stream := self._streams.get(record.stream_id)) is not None:
                stream.take_record(record)
        run, taken = message.tokens, 0
        for stream_id, index, offset, count in zip(run.stream_ids, run.indexes, run.offsets, run.counts, strict=True):
            stream = self._streams.get(stream_id)
            if stream is not None:
                logprobs = run.logprobs[taken : taken + count] if stream.message.response.logprobs else []
                stopped = stream.tokens(index, offset, list(run.token_ids[taken : taken + count]), list(logprobs))
                if stopped is not None:
                    self._stop_at(stream.request_id, index, stopped)
            taken += count
        for ended in message.ended:
            if (stream := self._streams.get(ended.stream_id)) is not None:
                stream.end(ended)
