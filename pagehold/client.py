"""The Python client: streams that go on across the death of a frontend.

    async with Client("127.0.0.1:50051") as client:
        async for text in client.text("What is the capital of France?", temperature=0.0):
            print(text, end="", flush=True)

A broken stream is resumed at the number of tokens received, on the same address (which may be
several frontends behind one name), until `resume_seconds` pass without one that answers.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Final, Self

import grpc

from pagehold.v1 import inference_pb2 as api
from pagehold.v1 import inference_pb2_grpc as api_grpc

DEFAULT_ADDRESS: Final = "127.0.0.1:50051"
DETACH_GRACE_SECONDS: Final = 30
_RETRY_SECONDS: Final = 0.05
_MOST_MESSAGE_BYTES: Final = 64 << 20
_SEVERAL: Final = re.compile(r"dns:|ipv[46]:.*,")
_SAMPLING: Final = frozenset(api.Sampling.DESCRIPTOR.fields_by_name)
_STOPPING: Final = frozenset(api.Stopping.DESCRIPTOR.fields_by_name)

Prompt = str | Sequence[int] | Sequence[dict[str, str]]


def make_request(prompt: Prompt, **options: Any) -> api.GenerateRequest:
    """A request from plain values.

    prompt: text as it is; token ids; or chat messages as `{"role": ..., "content": ...}`.
    options: any field of `Sampling`, `Stopping` or `GenerateRequest` by its name, and `logprobs`.
    Raises TypeError for an option that is none, ValueError for a value of the wrong kind.
    """
    request = api.GenerateRequest()
    if isinstance(prompt, str):
        request.text = prompt
    elif prompt and isinstance(prompt[0], dict):
        for message in prompt:
            request.chat.messages.add(**message)  # type: ignore[arg-type]
    else:
        request.token_ids.ids.extend(prompt)  # type: ignore[arg-type]
    request.response.detach_grace.seconds = DETACH_GRACE_SECONDS
    for name, value in options.items():
        if value is None:
            continue
        target: Any = request
        if name in _SAMPLING:
            target = request.sampling
        elif name in _STOPPING:
            target = request.stopping
        elif name == "logprobs":
            target = request.response
        elif name not in api.GenerateRequest.DESCRIPTOR.fields_by_name:
            raise TypeError(f"{name} is no field of GenerateRequest, Sampling or Stopping")
        _set(target, name, value)
    return request


def _set(target: Any, name: str, value: Any) -> None:
    if isinstance(value, dict):
        getattr(target, name).update(value)
    elif isinstance(value, (list, tuple)):
        getattr(target, name).extend(value)
    else:
        setattr(target, name, value)


class Client:
    """One channel to a frontend, or to several: `dns:///NAME:PORT`, `ipv4:HOST:PORT,HOST:PORT`, whose addresses take
    calls in turn. Use it from one event loop.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, resume_seconds: float = 30.0) -> None:
        """resume_seconds: how long a broken stream looks for a frontend before it gives up."""
        self._resume_seconds = resume_seconds
        self._channel = grpc.aio.insecure_channel(
            address,
            options=[
                ("grpc.initial_reconnect_backoff_ms", 50),
                # Despite its name this is how long one attempt may take.
                ("grpc.min_reconnect_backoff_ms", 5000),
                ("grpc.max_reconnect_backoff_ms", 500),
                ("grpc.max_receive_message_length", _MOST_MESSAGE_BYTES),
                *([("grpc.lb_policy_name", "round_robin")] if _SEVERAL.match(address) else []),
            ],
        )
        self._inference = api_grpc.InferenceServiceStub(self._channel)
        self.models = api_grpc.ModelServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def text(self, prompt: Prompt, **options: Any) -> AsyncIterator[str]:
        """The text of output 0, as it comes. options: see `make_request`."""
        async for response in self.generate(make_request(prompt, **options)):
            if response.WhichOneof("event") == "tokens" and response.tokens.index == 0:
                yield response.tokens.text

    async def generate(
        self, request: api.GenerateRequest, timeout: float | None = None
    ) -> AsyncIterator[api.GenerateResponse]:
        """Every event of the request, each once. Whoever stops iterating cancels the request.

        timeout: seconds until the request's deadline.
        Raises grpc.aio.AioRpcError with the server's status.
        """
        request.request_id = request.request_id or uuid.uuid4().hex
        deadline = time.monotonic() + timeout if timeout is not None else None
        reading = _Reading()
        done = False
        try:
            while not done:
                stream = self._open(request, reading, deadline)
                try:
                    async for response in stream:
                        reading.alive()
                        if reading.take(response):
                            yield response
                    done = True
                except grpc.aio.AioRpcError as error:
                    if not reading.may_retry(error, self._resume_seconds):
                        done = True
                        raise
                    await asyncio.sleep(_RETRY_SECONDS)
        finally:
            if not done:
                await self.cancel(request.request_id)

    def _open(self, request: api.GenerateRequest, reading: _Reading, deadline: float | None) -> Any:
        left = max(deadline - time.monotonic(), 0.001) if deadline is not None else None
        if not reading.accepted:
            # Not known to be open: sending it again under its id opens or attaches.
            return self._inference.Generate(request, timeout=left)
        again = api.ResumeRequest(request_id=request.request_id)
        for index, offset in reading.offsets.items():
            again.positions.add(index=index, offset=offset)
        return self._inference.Resume(again, timeout=left)

    async def cancel(self, request_id: str) -> None:
        """Ends a request. Repeating it is harmless; an unreachable frontend is not waited for."""
        try:
            await self._inference.Cancel(api.CancelRequest(request_id=request_id), timeout=2)
        except grpc.aio.AioRpcError:
            pass  # its grace ends it soon


class _Reading:
    """How far a client has come with one request, over all its streams."""

    def __init__(self) -> None:
        self.accepted = False
        self.offsets: dict[int, int] = {}  # tokens received, by output
        self._finished: set[int] = set()
        self._alone_since = 0.0
        self._broken = 0  # streams of its own that may still be on their way to the executor

    def alive(self) -> None:
        self._alone_since = 0.0

    def take(self, response: api.GenerateResponse) -> bool:
        """Whether the event is new to the reader."""
        match response.WhichOneof("event"):
            case "accepted":
                first, self.accepted = not self.accepted, True
                return first
            case "tokens":
                tokens = response.tokens
                self.offsets[tokens.index] = tokens.offset + len(tokens.token_ids)
            case "finished":
                index = response.finished.index
                first = index not in self._finished
                self._finished.add(index)
                return first
        return True

    def may_retry(self, error: grpc.aio.AioRpcError, seconds: float) -> bool:
        # Taken over, once for each stream that broke: by that very stream, whose frontend passed it on
        # after it was sent again elsewhere.
        by_itself = error.code() is grpc.StatusCode.ABORTED and self._broken > 0
        # Before `accepted` a full server is an answer; after it, it only means that this reader was too slow.
        slow = self.accepted and error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        # Of a call that meets a gRPC server's end on its way; what we cancel ourselves does not come back to us.
        lost = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        if not lost and not slow and not by_itself:
            return False
        self._broken += -1 if by_itself else 1
        self._alone_since = self._alone_since or time.monotonic()
        return time.monotonic() - self._alone_since < seconds
