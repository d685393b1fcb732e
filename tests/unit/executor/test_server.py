"""The service that frontends connect to, over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.executor.v1 import executor_pb2_grpc as ex_grpc
from pagehold.runtime.protocol import PROTOCOL
from services.executor.inbox import Connected, Disconnected, Event, FromFrontend, Inbox
from services.executor.server import ExecutorServicer


class Served:
    """The servicer over an inbox that nobody empties but the test."""

    def __init__(self, path: Path) -> None:
        self.inbox = Inbox()
        self.events: list[Event] = []
        self.address = f"unix:{path}"
        unused = cast(Any, None)
        self.servicer = ExecutorServicer(unused, unused, unused, self.inbox)

    async def start(self) -> None:
        self.server = grpc.aio.server()
        ex_grpc.add_ExecutorServiceServicer_to_server(self.servicer, self.server)
        self.server.add_insecure_port(self.address)
        await self.server.start()

    async def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(500):
            self.events += self.inbox.take(0)
            if condition():
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"never came true: {self.events}")


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    served = Served(tmp_path / "s")
    await served.start()
    yield served
    await served.server.stop(0)


def connection_of(served: Served) -> Any:
    event = served.events[0]
    assert isinstance(event, Connected)
    return event.connection


def is_over(served: Served) -> bool:
    return bool(served.events) and isinstance(served.events[-1], Disconnected)


async def test_messages_go_both_ways_and_the_end_is_told_last(served: Served) -> None:
    async with grpc.aio.insecure_channel(served.address) as channel:
        stream = ex_grpc.ExecutorServiceStub(channel).Connect()
        for number in range(3):
            await stream.write(ex.ConnectRequest(detach=ex.Detach(stream_id=number)))
        await served.until(lambda: len(served.events) == 4)
        connection = connection_of(served)
        for number in range(3):
            connection.offer(ex.ConnectResponse(accepted=[ex.Accepted(stream_id=number)]))
        for number in range(3):
            message = await asyncio.wait_for(stream.read(), 5)
            assert isinstance(message, ex.ConnectResponse) and message.accepted[0].stream_id == number
        await stream.done_writing()
        await served.until(lambda: is_over(served))
    received = [event.message.detach.stream_id for event in served.events if isinstance(event, FromFrontend)]
    assert received == [0, 1, 2] and connection.has_room
    assert [type(event) for event in served.events].count(Disconnected) == 1


async def test_a_frontend_that_dies_is_disconnected(served: Served) -> None:
    channel = grpc.aio.insecure_channel(served.address)
    stream = ex_grpc.ExecutorServiceStub(channel).Connect()
    await stream.write(ex.ConnectRequest(detach=ex.Detach(stream_id=1)))
    await served.until(lambda: len(served.events) == 2)
    await channel.close()
    await served.until(lambda: is_over(served))


async def test_a_writing_side_that_fails_ends_the_stream(served: Served) -> None:
    """Else its requests would look attached for ever, to a stream that hears nothing."""
    async with grpc.aio.insecure_channel(served.address) as channel:
        stream = ex_grpc.ExecutorServiceStub(channel).Connect()
        await stream.write(ex.ConnectRequest(detach=ex.Detach(stream_id=1)))
        await served.until(lambda: len(served.events) == 2)
        connection_of(served).offer(cast(ex.ConnectResponse, "cannot be serialized"))
        await served.until(lambda: is_over(served))
        assert await asyncio.wait_for(stream.read(), 5) is grpc.aio.EOF


async def test_a_frontend_two_versions_behind_is_told_what_to_do(served: Served) -> None:
    async with grpc.aio.insecure_channel(served.address) as channel:
        stub = ex_grpc.ExecutorServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Describe(ex.DescribeRequest(protocol=PROTOCOL + 2))
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "upgrade the executor" in (refused.value.details() or "")


async def test_an_executor_that_stops_ends_its_streams_itself(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    async with grpc.aio.insecure_channel(served.address) as channel:
        stream = ex_grpc.ExecutorServiceStub(channel).Connect()
        await stream.write(ex.ConnectRequest(detach=ex.Detach(stream_id=1)))
        await served.until(lambda: len(served.events) == 2)
        served.servicer.close()
        assert await asyncio.wait_for(stream.read(), 5) is grpc.aio.EOF
        await served.until(lambda: is_over(served))
        await served.server.stop(0)
    assert not caplog.records
