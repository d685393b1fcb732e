"""gRPC without gRPC: channels, calls and servers that the product's own stubs and servicers work on unchanged."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from tests.faults.simulator.faults import Killed
from tests.faults.simulator.messages.loop import Process, current_process
from tests.faults.simulator.messages.network import End, Network, Pipe

_CONNECT_SECONDS = 0.01  # between two looks whether somebody listens

_BROKEN = End(grpc.StatusCode.UNAVAILABLE, "the stream broke")
_CANCELLED = End(grpc.StatusCode.CANCELLED)
_OK = End(grpc.StatusCode.OK)


class Server:
    """A process's port."""

    def __init__(self, network: Network, process: Process, address: str, interceptors: tuple[Any, ...] = ()) -> None:
        self.process = process
        self._network = network
        self._address = address
        self._interceptors = interceptors
        self._handlers: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        pass  # the same as those below

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        for name, handler in handlers.items():
            self._handlers[f"/{service}/{name}"] = handler

    async def handler(self, path: str) -> Any:
        handler = self._handlers[path]

        async def continuation(details: Any) -> Any:
            return handler

        for interceptor in self._interceptors:
            handler = await interceptor.intercept_service(continuation, None)
        return handler

    def start(self) -> None:
        self._network.listen(self._address, self)


class Stream:
    """One call, between two processes."""

    def __init__(self, network: Network, client: Process, address: str, path: str, waits: bool) -> None:
        """waits: for somebody to listen there; else the call fails."""
        self.network = network
        self.client = client
        self.path = path
        self.server: Server | None = None
        self.deadline: float | None = None
        self.up = Pipe(network)
        self.down = Pipe(network)
        self.over = False
        self._handling: asyncio.Task[Any] | None = None
        network.streams[self] = None
        network.wires.spawn(self._connect(address, waits))

    @property
    def ends(self) -> tuple[Process | None, Process | None]:
        return self.client, self.server.process if self.server is not None else None

    async def _connect(self, address: str, waits: bool) -> None:
        await asyncio.sleep(self.network.delay())
        while not self.over and (server := self.network.find(address)) is None:
            if not waits:
                self.cut()
                return
            await asyncio.sleep(_CONNECT_SECONDS)
        if not self.over and server is not None:
            self.server = server
            self._handling = server.process.spawn(self._serve(server))

    async def _serve(self, server: Server) -> None:
        context = ServerContext(self)
        try:
            await self._handle(await server.handler(self.path), context)
            context.end = _OK
        except grpc.aio.AbortError:
            pass
        except Killed:
            server.process.kill()
            return
        except Exception as error:
            if server.process.alive:
                self.network.loop.faults.append(error)
            context.end = End(grpc.StatusCode.UNKNOWN, repr(error))
        self.down.send(context.end)
        self.network.streams.pop(self, None)

    async def _handle(self, handler: Any, context: ServerContext) -> None:
        context.serialize = handler.response_serializer
        if not handler.request_streaming:
            first = await self.up.receive()
            if not isinstance(first, bytes):
                raise grpc.aio.AbortError  # broken before the request came: nobody is called
            request = handler.request_deserializer(first)
            if handler.response_streaming:
                await handler.unary_stream(request, context)
            else:
                await context.write(await handler.unary_unary(request, context))
            return
        method, requests = handler.stream_stream, self._requests(handler.request_deserializer)
        if not inspect.isasyncgenfunction(method):
            await method(requests, context)
            return
        async for response in method(requests, context):
            await context.write(response)

    async def _requests(self, deserialize: Callable[[bytes], Any]) -> AsyncIterator[Any]:
        while isinstance(item := await self.up.receive(), bytes):
            yield deserialize(item)

    def cut(self, end: End = _BROKEN) -> None:
        """Both sides notice, each in its time."""
        if self.over:
            return
        self.over = True
        self.network.streams.pop(self, None)
        self.network.client_breaks += self.path.startswith("/pagehold.v1.")
        self.up.cut(end)
        self.down.cut(end)
        if self._handling is not None:
            self.network.loop.call_later(self.network.delay(), self._handling.cancel)

    def expire(self) -> None:
        self.cut(End(grpc.StatusCode.DEADLINE_EXCEEDED))


class ServerContext:
    """What a servicer's method is given."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.serialize: Callable[[Any], bytes] = bytes
        self.end = End(grpc.StatusCode.UNKNOWN)

    async def write(self, response: Any) -> None:
        await self._stream.down.room()
        if self._stream.server is not None and self._stream.server.process.alive:
            self._stream.down.send(self.serialize(response))

    def time_remaining(self) -> float | None:
        deadline = self._stream.deadline
        return None if deadline is None else deadline - self._stream.network.loop.time()

    async def abort_with_status(self, status: Any) -> None:
        self.end = End(status.code, status.details)
        raise grpc.aio.AbortError

    async def abort(self, code: grpc.StatusCode, details: str = "") -> None:
        self.end = End(code, details)
        raise grpc.aio.AbortError


class Call:
    """The client's side of a stream."""

    def __init__(self, stream: Stream, serialize: Callable[[Any], bytes], deserialize: Callable[[bytes], Any]) -> None:
        self._stream = stream
        self._serialize = serialize
        self._deserialize = deserialize

    async def write(self, request: Any) -> None:
        await self._stream.up.room()
        if self._stream.over:
            raise asyncio.InvalidStateError
        if self._stream.client.alive:
            self._stream.up.send(self._serialize(request))

    async def read(self) -> Any:
        try:
            item = await self._stream.down.receive()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if isinstance(item, bytes):
            return self._deserialize(item)
        self._stream.over = True
        if item.code is grpc.StatusCode.OK:
            return grpc.aio.EOF
        raise item.error()

    def cancel(self) -> None:
        self._stream.cut(_CANCELLED)

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> Any:
        response = await self.read()
        if response is grpc.aio.EOF:
            raise StopAsyncIteration
        return response


class Channel:
    """What `grpc.aio.insecure_channel` gives: the way from the calling process to whoever listens at the address."""

    def __init__(self, network: Network, address: str) -> None:
        process = current_process()
        assert process is not None, "only processes call"
        self._network = network
        self._process = process
        self._address = address
        self._streams: list[Stream] = []

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        for stream in self._streams:
            stream.cut(_CANCELLED)

    def _open(self, path: str, timeout: float | None, waits: bool | None) -> Stream:
        stream = Stream(self._network, self._process, self._address, path, bool(waits))
        if not self._process.alive:
            stream.cut()
        if timeout is not None:
            stream.deadline = self._network.loop.time() + timeout
            self._network.loop.call_later(timeout, stream.expire)
        self._streams = [other for other in self._streams if not other.over]
        self._streams.append(stream)
        return stream

    def stream_stream(self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        def call(timeout: float | None = None, wait_for_ready: bool | None = None, **_: Any) -> Call:
            return Call(self._open(path, timeout, wait_for_ready), request_serializer, response_deserializer)

        return call

    def unary_stream(self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        def call(request: Any, timeout: float | None = None, wait_for_ready: bool | None = None, **_: Any) -> Call:
            stream = self._open(path, timeout, wait_for_ready)
            stream.up.send(request_serializer(request))
            return Call(stream, request_serializer, response_deserializer)

        return call

    def unary_unary(self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        async def call(request: Any, timeout: float | None = None, wait_for_ready: bool | None = None, **_: Any) -> Any:
            stream = self._open(path, timeout, wait_for_ready)
            stream.up.send(request_serializer(request))
            call = Call(stream, request_serializer, response_deserializer)
            response = await call.read()
            stream.over = True
            return response

        return call
