"""`pagehold.v1.InferenceService`: checks, tokenizes, hands over to the link, streams back."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from typing import Any, Final

import grpc

from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.runtime import failpoint
from pagehold.v1 import inference_pb2 as api
from pagehold.v1 import inference_pb2_grpc as api_grpc
from services.frontend.clientstream import ClientStream
from services.frontend.errors import (
    RequestError,
    guarded,
    guarded_stream,
    invalid,
    unavailable,
)
from services.frontend.link import TENANT, ExecutorLink
from services.frontend.validation import (
    ServedModel,
    check_id,
    check_model,
    check_prompt,
    check_request,
    digest,
    prompt_text,
)

# Texts beyond this are tokenized in a thread, so that other streams go on meanwhile.
_LONG_TEXT: Final = 4096
# A stream that breaks here detaches its request for as long as the executor would after our death.
_SHUTDOWN_GRACE: Final = 30.0


class InferenceServicer(api_grpc.InferenceServiceServicer):
    """Stateless: all it holds are open streams."""

    def __init__(self, link: ExecutorLink, max_streams: int, max_stream_buffer: int) -> None:
        self._link = link
        self._max_streams = max_streams
        self._max_stream_buffer = max_stream_buffer
        self.draining = False

    @guarded_stream
    async def Generate(self, request: api.GenerateRequest, context: Any) -> AsyncGenerator[api.GenerateResponse, None]:
        model = self._model()
        check_request(request, model)
        prompt = await self._tokens(request, model)
        max_tokens = check_prompt(request, prompt, model)
        body = digest(request)
        request.request_id = request.request_id or uuid.uuid4().hex
        stream = self._stream(request.request_id, model)
        stream.begin(request)
        remaining = context.time_remaining()
        stream.submit = ex.Submit(
            stream_id=stream.stream_id,
            tenant=TENANT,
            request=request.SerializeToString(),
            digest=body,
            prompt=prompt,
            max_tokens=max_tokens,
            timeout_ms=max(int(remaining * 1000), 1) if remaining is not None else 0,
        )
        grace = request.response.detach_grace
        async for response in self._serve(stream, grace.seconds + grace.nanos / 1e9):
            yield response

    @guarded_stream
    async def Resume(self, request: api.ResumeRequest, context: Any) -> AsyncGenerator[api.GenerateResponse, None]:
        model = self._model()
        if not request.request_id:
            raise invalid("request_id", "is empty")
        check_id(request.request_id)
        stream = self._stream(request.request_id, model)
        stream.describe = True
        stream.positions = {position.index: position.offset for position in request.positions}
        # Whoever resumes has lost a stream before: losing this one too does not end the request.
        async for response in self._serve(stream, _SHUTDOWN_GRACE):
            yield response

    @guarded
    async def Cancel(self, request: api.CancelRequest, context: Any) -> api.CancelResponse:
        if not request.request_id:
            raise invalid("request_id", "is empty")
        check_id(request.request_id)
        self._link.cancel(request.request_id)
        return api.CancelResponse()

    @guarded
    async def Tokenize(self, request: api.TokenizeRequest, context: Any) -> api.TokenizeResponse:
        model = self._model()
        check_model(request.model, model)
        return api.TokenizeResponse(ids=await self._encode(request, model))

    @guarded
    async def Detokenize(self, request: api.DetokenizeRequest, context: Any) -> api.DetokenizeResponse:
        model = self._model()
        check_model(request.model, model)
        for token in request.ids:
            if token >= model.described.vocab_size:
                raise invalid("ids", f"token id {token} is not in the vocabulary of {model.described.vocab_size}")
        return api.DetokenizeResponse(text=model.tokenizer.decode(request.ids))

    async def _serve(self, stream: ClientStream, grace: float) -> AsyncGenerator[api.GenerateResponse, None]:
        self._link.open(stream)
        try:
            while not stream.done:
                for response in await stream.drain():
                    failpoint.hit("frontend.write.before")
                    yield response
            if stream.error is not None:
                raise stream.error
        finally:
            # Only a client that went away by itself says what should become of its request.
            ours = self.draining or stream.error is not None
            self._link.close(stream, _SHUTDOWN_GRACE if ours else grace)

    def _stream(self, request_id: str, model: ServedModel) -> ClientStream:
        if self._link.open_streams >= self._max_streams:
            message = f"all {self._max_streams} streams of this frontend are in use; try again later"
            raise RequestError(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS", message, retry_seconds=1.0)
        return ClientStream(self._link.next_id(), request_id, model.tokenizer.decode, self._max_stream_buffer)

    def _model(self) -> ServedModel:
        if self.draining:
            raise unavailable("this frontend is shutting down; call another")
        if self._link.model is None:
            raise unavailable("no executor is ready yet; try again in a moment")
        return self._link.model

    async def _tokens(self, request: api.GenerateRequest, model: ServedModel) -> list[int]:
        if request.WhichOneof("prompt") == "token_ids":
            return list(request.token_ids.ids)
        return await self._encode(request, model)

    async def _encode(self, request: api.GenerateRequest | api.TokenizeRequest, model: ServedModel) -> list[int]:
        text, is_chat = prompt_text(request, model)
        encode = model.tokenizer.encode_chat if is_chat else model.tokenizer.encode
        return encode(text) if len(text) < _LONG_TEXT else await asyncio.to_thread(encode, text)
