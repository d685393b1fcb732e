"""Clients that misbehave beside others: who never reads, goes away in every phase, or only holds connections."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest

from pagehold.runtime.statedir import StateDir
from pagehold.v1 import inference_pb2 as api
from pagehold.v1 import inference_pb2_grpc as api_grpc
from tests.conftest import COMMAND, Stack
from tests.faults.seen import look, map_tables
from tests.faults.streams import Heard, Load, generate, renamed, undisturbed
from tests.faults.streams import request as stream

pytestmark = pytest.mark.stack

SECONDS = 60.0  # far longer than anything here takes
CONNECTIONS = 5_000  # of each kind
# Nothing of a stream is sent ahead of its reader: the server's writes wait as soon as nobody reads.
SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 64), ("grpc.use_local_subchannel_pool", 1)]


@pytest.fixture
def others(request: pytest.FixtureRequest) -> list[api.GenerateRequest]:
    """Of clients that behave; each test's are requests of their own."""
    return renamed([stream(number, tokens=64) for number in range(3)], request.node.name)


async def until(found: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + SECONDS
    while not found():
        assert time.monotonic() < give_up, what
        await asyncio.sleep(0.02)


def megabytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 >> 20


async def nothing_is_left(stack: Stack) -> None:
    """No row is held, no stream is open, and nothing contradicts anything."""
    tables, state = map_tables(StateDir(stack.state_dir)), StateDir(stack.state_dir)
    await until(lambda: not look(state, tables).rows, "a row is held by nobody")
    assert not stack.status()["sequences"]
    command = [*COMMAND, "fsck", "--state-dir", str(stack.state_dir)]
    report = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=SECONDS)
    assert report.returncode == 0, report.stdout


async def test_a_client_that_never_reads(stack: Stack, others: list[api.GenerateRequest]) -> None:
    """Its stream ends or rests; what it missed is there when it reads again. Others do not notice."""
    silent = stream(70, tokens=160)
    silent.n, silent.response.logprobs, silent.response.detach_grace.seconds = 4, True, 30
    reference = await undisturbed(stack.address, [*others, silent])
    pid = stack.pids()["frontend"]
    before = megabytes(pid)
    async with grpc.aio.insecure_channel(stack.address, options=SMALL_WINDOW) as channel:
        call = api_grpc.InferenceServiceStub(channel).Generate(silent)
        assert (await call.read()).WhichOneof("event") == "accepted"
        load = Load(stack.address, others)
        assert await load.answers() == reference[:-1]
        assert megabytes(pid) - before < 64
        heard = Heard.of(silent)
        resumed = api.ResumeRequest(request_id=silent.request_id)
        async with grpc.aio.insecure_channel(stack.address) as other:
            async for response in api_grpc.InferenceServiceStub(other).Resume(resumed):
                heard.take(response)
        assert heard.answer == reference[-1]
        call.cancel()
    await nothing_is_left(stack)


PHASES = ("before accepted", "prefill", "fork", "decode", "end")


def patient(name: str, phase: str, grace: int) -> api.GenerateRequest:
    """A request that is in this phase for long enough to be left in it."""
    message = stream(len(name), tokens=48 if phase != "end" else 4)
    message.request_id = name
    if phase in ("prefill", "before accepted"):
        message.token_ids.ids.extend(1000 + (len(name) * 7919 + 31 * place) % 20_000 for place in range(1500))
    if phase == "fork":
        message.n = 4
    message.response.detach_grace.seconds = grace
    return message


async def leave(stack: Stack, message: api.GenerateRequest, phase: str, goes: Callable[..., Awaitable[None]]) -> None:
    """Opens the stream, and goes away in the phase."""
    channel = grpc.aio.insecure_channel(stack.address, options=[("grpc.use_local_subchannel_pool", 1)])
    call = api_grpc.InferenceServiceStub(channel).Generate(message)
    heard = Heard.of(message)
    if phase == "before accepted":
        await call.wait_for_connection()
    else:
        tokens = {"prefill": 0, "fork": 1, "decode": 8, "end": 4}[phase]
        while not heard.accepted or max(len(output.tokens) for output in heard.outputs) < tokens:
            response = await call.read()
            assert isinstance(response, api.GenerateResponse)
            heard.take(response)
    await goes(call, channel)


async def cancels(call: grpc.aio.UnaryStreamCall, channel: grpc.aio.Channel) -> None:
    call.cancel()
    await channel.close()


async def breaks(call: grpc.aio.UnaryStreamCall, channel: grpc.aio.Channel) -> None:
    await channel.close()


@pytest.mark.parametrize("grace", [0, 1])
async def test_a_client_that_goes_away_in_each_phase(
    stack: Stack, others: list[api.GenerateRequest], grace: int
) -> None:
    """Without a grace its request ends at once; with one, after it, or goes on for whoever comes back."""
    reference = await undisturbed(stack.address, others)
    load = Load(stack.address, others)
    for goes in (cancels, breaks):
        for phase in PHASES:
            name = f"{goes.__name__}-{phase}-{grace}".replace(" ", "-")
            await leave(stack, patient(name, phase, grace), phase, goes)
    assert await load.answers() == reference
    await nothing_is_left(stack)


class Relay:
    """Between a client and the frontend. `part` leaves the frontend with a connection that nobody is behind."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._to = host, int(port)
        self._parted = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *error: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()

    def part(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other_reader, other_writer = await asyncio.open_connection(*self._to, limit=1024)
        self._tasks += [
            asyncio.create_task(self._pump(reader, other_writer)),
            asyncio.create_task(self._pump(other_reader, writer)),
        ]

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while part := await reader.read(1024):
            writer.write(part)
            await writer.drain()


async def test_a_client_behind_a_dead_line(stack: Stack) -> None:
    """Nobody answers and nobody closes: the request ends by itself, and can be resumed elsewhere meanwhile."""
    message = stream(60, tokens=48)
    reference = await undisturbed(stack.address, [message])
    tables, state = map_tables(StateDir(stack.state_dir)), StateDir(stack.state_dir)
    relay = Relay(stack.address)
    async with relay as address:
        half = asyncio.create_task(generate(address, message))
        heard = Heard.of(message)
        await until(lambda: bool(look(state, tables).rows), "the request did not arrive")
        relay.part()
        async with grpc.aio.insecure_channel(stack.address) as channel:
            stub = api_grpc.InferenceServiceStub(channel)
            async for response in stub.Resume(api.ResumeRequest(request_id=message.request_id)):
                heard.take(response)
        assert [heard.answer] == reference
        half.cancel()
    await nothing_is_left(stack)


async def test_ten_thousand_connections_that_say_nothing(stack: Stack, others: list[api.GenerateRequest]) -> None:
    """Half of them do not even begin; half say hello. They cost memory by the kilobyte, and nobody else anything."""
    reference = await undisturbed(stack.address, others)
    pid = stack.pids()["frontend"]
    host, _, port = stack.address.rpartition(":")
    open_before, before = descriptors(pid), megabytes(pid)
    hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)  # the preface, empty settings
    load = Load(stack.address, others)
    held: list[socket.socket] = []
    try:
        for number in range(2 * CONNECTIONS):
            held.append(socket.create_connection((host, int(port)), SECONDS))
            if number % 2:
                held[-1].sendall(hello)
            if number % 500 == 0:
                await asyncio.sleep(0)
        # Those of the reference may have been closed since.
        await until(lambda: descriptors(pid) > 2 * CONNECTIONS, f"not all were taken: {descriptors(pid)}")
        assert await load.answers() == reference
        late = [stream(50, tokens=16)]
        assert len((await Load(stack.address, late).answers())[0].tokens) == 16
        assert megabytes(pid) - before < 64 * 2 * CONNECTIONS >> 10, "more than 64 KiB for a silent connection"
    finally:
        for one in held:
            one.close()
    await until(lambda: descriptors(pid) <= open_before + 2, "connections are kept that are closed")
    await nothing_is_left(stack)


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
