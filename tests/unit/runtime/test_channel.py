"""Internal channels: a peer that says nothing for long is asked, and not cut off for it; sockets that come and go."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from pagehold.runtime import channel

HANG_SECONDS = 0.2
PINGS_SECONDS = 3.5  # gRPC leaves a second between two pings


async def test_a_silent_stream_outlives_many_pings(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/socket"
    health = HealthServicer()
    strict = ("grpc.http2.max_ping_strikes", 1)  # a server that hangs up at the second ping too many
    server = grpc.aio.server(options=[*channel.server_options(), strict])
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    server.add_insecure_port(address)
    await server.start()
    async with grpc.aio.insecure_channel(address, options=channel.client_options(HANG_SECONDS)) as way:
        stream = health_pb2_grpc.HealthStub(way).Watch(health_pb2.HealthCheckRequest())
        first = await stream.read()
        await asyncio.sleep(PINGS_SECONDS)
        await health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        second = await stream.read()
    assert (first.status, second.status) == (
        health_pb2.HealthCheckResponse.SERVING,
        health_pb2.HealthCheckResponse.NOT_SERVING,
    )
    await server.stop(0)


async def test_a_socket_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    waiting = asyncio.create_task(channel.listening(f"unix:{path}"))
    path.touch()  # not one that somebody listens on
    await asyncio.sleep(0.05)
    assert not waiting.done()
    path.unlink()
    server = await asyncio.start_unix_server(lambda reader, writer: writer.close(), path)
    async with asyncio.timeout(30):
        await waiting
    server.close()


async def test_what_is_no_unix_socket_is_not_waited_for() -> None:
    async with asyncio.timeout(30):
        await channel.listening("127.0.0.1:1")


async def test_a_peer_whose_machine_is_gone_is_missed() -> None:
    """The connection stays open, and nothing comes: as after a power cut."""
    gone, ended = asyncio.Event(), asyncio.Event()

    class Servicer(health_pb2_grpc.HealthServicer):
        async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
            try:
                await context.write(health_pb2.HealthCheckResponse())
                await asyncio.Event().wait()
            finally:
                ended.set()

    server = grpc.aio.server(options=channel.server_options(HANG_SECONDS))
    health_pb2_grpc.add_HealthServicer_to_server(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async def relay(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(4096):
            if not gone.is_set():
                sink.write(data)

    async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(relay(reader, there[1]), relay(there[0], writer))

    between = await asyncio.start_server(join, "127.0.0.1", 0)
    address = f"127.0.0.1:{between.sockets[0].getsockname()[1]}"
    async with grpc.aio.insecure_channel(address, options=[("grpc.keepalive_time_ms", 1 << 30)]) as way:
        stream = health_pb2_grpc.HealthStub(way).Watch(health_pb2.HealthCheckRequest())
        await stream.read()
        gone.set()
        async with asyncio.timeout(30):
            await ended.wait()
    between.close()
    await server.stop(0)


async def test_it_is_said_once_that_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_SILENT_SECONDS", 0.02)
    waiting = asyncio.create_task(channel.listening(f"unix:{tmp_path}/socket"))
    with structlog.testing.capture_logs() as logs:
        await asyncio.sleep(0.3)
    waiting.cancel()
    assert [(line["event"][:21], line["socket"]) for line in logs] == [("nobody listens there;", f"{tmp_path}/socket")]
