"""Internal channels: a peer that says nothing for long is asked, and not cut off for it; sockets that come and go."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
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
