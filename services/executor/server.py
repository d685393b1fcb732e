"""The executor's gRPC service: shuttles messages between frontends and the step thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import structlog

from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.executor.v1 import executor_pb2_grpc as ex_grpc
from pagehold.runtime.protocol import PROTOCOL, skew
from services.executor.engine import Engine
from services.executor.inbox import Connected, Disconnected, FromFrontend, Inbox, Wake
from services.executor.modelstore.store import PackedModel
from services.executor.publisher import Connection
from services.executor.shared import SharedPool

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Description:
    """What never changes while the executor runs."""

    model: PackedModel
    served_model_name: str
    max_model_len: int
    device: str
    dtype: str
    kv_dtype: str
    deterministic: bool
    speculation: str


class ExecutorServicer(ex_grpc.ExecutorServiceServicer):
    """Runs on the event loop; nothing here blocks."""

    def __init__(self, description: Description, pool: SharedPool, engine: Engine, inbox: Inbox) -> None:
        self._description = description
        self._pool = pool
        self._engine = engine
        self._inbox = inbox
        self._closing = asyncio.Event()

    def close(self) -> None:
        """Ends all streams. Those that the server has to cancel end with a traceback in the log."""
        self._closing.set()

    async def Describe(
        self, request: ex.DescribeRequest, context: grpc.aio.ServicerContext[ex.DescribeRequest, ex.DescribeResponse]
    ) -> ex.DescribeResponse:
        if wrong := skew("executor", "frontend", request.protocol):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, wrong)
        described, model = self._description, self._description.model
        return ex.DescribeResponse(
            served_model_name=described.served_model_name,
            fingerprint=model.fingerprint,
            max_model_len=described.max_model_len,
            vocab_size=model.spec.vocab_size,
            eos_token_ids=model.eos_token_ids,
            tokenizer_json=model.tokenizer_json,
            chat_template=model.chat_template,
            special_tokens=model.special_tokens,
            device=described.device,
            dtype=described.dtype,
            kv_dtype=described.kv_dtype,
            deterministic=described.deterministic,
            speculation=described.speculation,
            epoch=self._pool.epoch,
            page_size=self._pool.page_size,
            pages=self._pool.pages - 1,
            add_bos_token=model.add_bos_token,
            bos_token_id=model.bos_token_id or 0,
            protocol=PROTOCOL,
        )

    async def GetLoad(
        self, request: ex.GetLoadRequest, context: grpc.aio.ServicerContext[ex.GetLoadRequest, ex.GetLoadResponse]
    ) -> ex.GetLoadResponse:
        scheduler = self._engine.scheduler
        return ex.GetLoadResponse(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            free_pages=self._pool.free_pages(),
            pages=self._pool.pages - 1,
            prefill_tokens=self._engine.prefill_tokens,
            decode_tokens=self._engine.decode_tokens,
            preemptions=self._engine.pages.preemptions,
            draft_tokens=self._engine.draft_tokens,
            accepted_tokens=self._engine.accepted_tokens,
            steps=self._engine.steps,
            step_sequences=self._engine.step_sequences,
            step_seconds=self._engine.step_seconds,
        )

    async def Connect(
        self,
        request_iterator: AsyncIterator[ex.ConnectRequest],
        context: grpc.aio.ServicerContext[ex.ConnectRequest, ex.ConnectResponse],
    ) -> None:
        connection = Connection(asyncio.get_running_loop(), lambda: self._inbox.put(Wake()))
        self._inbox.put(Connected(connection))
        reader = asyncio.create_task(self._read(connection, request_iterator))
        writer = asyncio.create_task(self._write(connection, context))
        closing = asyncio.create_task(self._closing.wait())
        try:
            # A side that fails takes the other with it: a stream that only listens would look alive for ever.
            await asyncio.wait((reader, writer, closing), return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                log.warning("a frontend's stream failed", exc_info=writer.exception())
        finally:
            for task in (reader, writer, closing):
                task.cancel()
            await asyncio.gather(reader, writer, closing, return_exceptions=True)
            self._inbox.put(Disconnected(connection))

    async def _read(self, connection: Connection, requests: AsyncIterator[ex.ConnectRequest]) -> None:
        async for message in requests:
            self._inbox.put(FromFrontend(connection, message))

    async def _write(
        self, connection: Connection, context: grpc.aio.ServicerContext[ex.ConnectRequest, ex.ConnectResponse]
    ) -> None:
        while True:
            await context.write(await connection.take())
            connection.written()
