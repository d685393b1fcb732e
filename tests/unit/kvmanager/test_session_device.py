"""The session of an executor whose pool is on a device: what its attach waits for, and what it cannot get around."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from kvmanager import session as sessions
from kvmanager.device import packets
from kvmanager.device.leash import Leash
from kvmanager.device.packets import NO_POOL
from kvmanager.layout import PoolKind
from kvmanager.service import Manager
from kvmanager.session import KvManagerServicer
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.kv.v1 import kv_manager_pb2_grpc as kv_grpc
from pagehold.runtime.progress import Progress
from pagehold.runtime.statedir import StateDir
from tests.device.fake_memory import FakeExporter
from tests.unit.kvmanager.files import open_call, take_lock
from tests.unit.kvmanager.test_device_pool import ONE, device_request

MIB = 1 << 20


class Daemon:
    """A manager behind both its sockets."""

    def __init__(self, state: StateDir) -> None:
        self.state = state
        self.exporter = FakeExporter(PoolKind.VMM)
        manager = Manager(state, 1 << 24, 600.0, lambda name: None, exporter=lambda kind: self.exporter)
        self.leash = Leash(state.leash_socket)
        self.leash.start()
        self.servicer = KvManagerServicer(
            manager, Progress(state.progress("kvmanager")), lambda error: None, self.leash
        )

    async def start(self) -> None:
        self.server = grpc.aio.server()
        kv_grpc.add_KvManagerServiceServicer_to_server(self.servicer, self.server)
        self.server.add_insecure_port(f"unix:{self.state.kvmanager_socket}")
        await self.server.start()

    def greet(self, who: bytes = ONE) -> socket.socket:
        leash = packets.connect(self.state.leash_socket)
        leash.settimeout(5)
        pidfd = packets.pidfd_of_self()
        packets.send(leash, who, NO_POOL, [pidfd])
        os.close(pidfd)
        return leash


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    daemon = Daemon(StateDir.prepare(tmp_path / "s"))
    await daemon.start()
    take_lock(daemon.state, ONE).release()
    yield daemon
    await daemon.server.stop(0)
    daemon.leash.close()


async def ask(daemon: Daemon, *calls: kv.Call) -> list[kv.Reply]:
    async with grpc.aio.insecure_channel(f"unix:{daemon.state.kvmanager_socket}") as channel:
        stream = kv_grpc.KvManagerServiceStub(channel).Session()
        await stream.write(kv.SessionRequest(calls=calls))
        response = await asyncio.wait_for(stream.read(), 10)
        if not isinstance(response, kv.SessionResponse):
            raise ConnectionError((await stream.code()).name)
        return list(response.replies)


def attach_call() -> kv.Call:
    return kv.Call(attach=device_request(ONE, PoolKind.VMM))


async def test_the_descriptor_is_there_before_the_answer(daemon: Daemon) -> None:
    with daemon.greet() as leash:
        (reply,) = await ask(daemon, attach_call())
        leash.setblocking(False)
        packet = packets.receive(leash)
    assert packet is not None and packet.pool_uuid == reply.attach.export.pool_uuid
    assert os.fstat(packet.fds[0]).st_size == reply.attach.export.size == 2 * MIB
    packet.close()


async def test_without_a_greeting_the_executor_is_to_try_again(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_GREETING_SECONDS", 0.05)
    with pytest.raises(grpc.aio.AioRpcError) as found:
        await ask(daemon, attach_call())
    assert found.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_an_attach_behind_another_call_does_not_get_around_the_leash(daemon: Daemon) -> None:
    replies = await ask(daemon, open_call("a"), attach_call())
    assert [reply.error.reason for reply in replies] == [kv.ERROR_REASON_STALE_EPOCH] * 2


async def test_memory_that_is_about_to_come_back_is_waited_for(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_ROOM_LOOK_SECONDS", 0.02)
    daemon.exporter.capacity = MIB
    with daemon.greet():
        asking = asyncio.create_task(ask(daemon, attach_call()))
        await asyncio.sleep(0.1)
        assert not asking.done()
        daemon.exporter.capacity = 4 * MIB
        (reply,) = await asking
        assert reply.HasField("attach")


async def test_but_not_for_ever(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_ROOM_SECONDS", 0.05)
    monkeypatch.setattr(sessions, "_ROOM_LOOK_SECONDS", 0.02)
    daemon.exporter.capacity = MIB
    with daemon.greet():
        (reply,) = await ask(daemon, attach_call())
    assert reply.error.reason == kv.ERROR_REASON_NO_MEMORY
