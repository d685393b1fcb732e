"""`pagehold.v1.InferenceService`: checks, tokenizes, hands over to the link, streams back."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import grpc

from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.runtime import failpoint
from pagehold.v1 import inference_pb2 as api
from pagehold.v1 import inference_pb2_grpc as api_grpc
from services.frontend.clientstream import ClientStream
from services.frontend.errors import RequestError, unavailable
from services.frontend.link import LOST_GRACE, TENANT, ExecutorLink
from services.frontend.tally import Tally
from services.frontend.validation import (
    ServedModel,
    check_detokenize,
    check_id,
    check_model,
    check_prompt,
    check_request,
    check_resume,
    digest,
    encode_prompt,
)

T = TypeVar("T")

# Larger messages are worked on in threads, so that other streams go on meanwhile; few threads,
# so that the executor keeps its processors.
_LARGE: Final = 4096  # bytes
_THREADS: Final = 2


class InferenceServicer(api_grpc.InferenceServiceServicer):
    """Stateless: all it holds are open streams."""

    def __init__(self, link: ExecutorLink, max_streams: int, max_stream_buffer: int, tally: Tally) -> None:
        self._link = link
        self._tally = tally
        self._max_streams = max_streams
        self._max_stream_buffer = max_stream_buffer
        self._calls = 0
        self._threads = ThreadPoolExecutor(_THREADS, "tokenize")
        self.draining = False

    async def Generate(self, request: api.GenerateRequest, context: Any) -> None:
        with self._tally.answer() as answer, self._admitted() as model:
            check_request(request, model)
            prompt = await self._work(request.ByteSize(), lambda: encode_prompt(request, model))
            max_tokens = check_prompt(request, prompt, model)
            body = digest(request)
            request.request_id = request.request_id or uuid.uuid4().hex
            stream = self._stream(request.request_id, model)
            stream.begin(request)
            remaining = context.time_remaining()
            stream.deadline = time.monotonic() + remaining if remaining is not None else None
            stream.submit = ex.Submit(
                stream_id=stream.stream_id,
                tenant=TENANT,
                request=request.SerializeToString(),
                digest=body,
                prompt=prompt,
                max_tokens=max_tokens,
            )
            failpoint.hit("frontend.submit.before")
            await self._serve(stream, context, answer.first_token)

    async def Resume(self, request: api.ResumeRequest, context: Any) -> None:
        with self._tally.answer(), self._admitted() as model:
            check_resume(request)
            stream = self._stream(request.request_id, model)
            stream.describe = True
            stream.positions = {position.index: position.offset for position in request.positions}
            # Whoever resumes has lost a stream before: losing this one too does not end the request.
            stream.least_grace = LOST_GRACE
            failpoint.hit("frontend.resume.before")
            await self._serve(stream, context, lambda: None)

    async def Cancel(self, request: api.CancelRequest, context: Any) -> api.CancelResponse:
        check_id(request.request_id, required=True)
        failpoint.hit("frontend.cancel.before")
        self._link.cancel(request.request_id)
        return api.CancelResponse()

    async def Tokenize(self, request: api.TokenizeRequest, context: Any) -> api.TokenizeResponse:
        with self._admitted() as model:
            check_model(request.model, model)
            ids = await self._work(request.ByteSize(), lambda: encode_prompt(request, model))
            return api.TokenizeResponse(ids=ids)

    async def Detokenize(self, request: api.DetokenizeRequest, context: Any) -> api.DetokenizeResponse:
        with self._admitted() as model:
            check_detokenize(request, model)
            text = await self._work(request.ByteSize(), lambda: model.tokenizer.decode(request.ids))
            return api.DetokenizeResponse(text=text)

    async def _serve(self, stream: ClientStream, context: Any, on_first_token: Callable[[], None]) -> None:
        self._link.open(stream)
        has_begun = False
        try:
            while not stream.finished:
                for response in await stream.drain():
                    if not has_begun and response.HasField("tokens"):
                        has_begun = True
                        on_first_token()
                    failpoint.hit("frontend.write.before")
                    await context.write(response)
                    failpoint.hit("frontend.write.after")
                if stream.error is not None and not stream.finished:
                    raise stream.error
        finally:
            # Only a client that went away by itself says what should become of its request.
            self._link.close(stream, gone=stream.error is None and not self.draining)

    @contextmanager
    def _admitted(self) -> Iterator[ServedModel]:
        """Counts the call. Raises RequestError when there are too many, or nothing to call."""
        if self.draining:
            raise unavailable("this frontend is shutting down; call another")
        model = self._link.served()
        if self._calls >= self._max_streams:
            message = f"all {self._max_streams} streams of this frontend are in use; try again later"
            raise RequestError(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS", message, retry_seconds=1.0)
        self._calls += 1
        try:
            yield model
        finally:
            self._calls -= 1

    def _stream(self, request_id: str, model: ServedModel) -> ClientStream:
        return ClientStream(self._link.next_id(), request_id, model.tokenizer, self._max_stream_buffer)

    async def _work(self, size: int, work: Callable[[], T]) -> T:
        if size < _LARGE:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
