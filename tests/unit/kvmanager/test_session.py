"""Real gRPC over a unix socket: who holds the session, and in what order calls are answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from kvmanager.session import KvManagerServicer
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.kv.v1 import kv_manager_pb2_grpc as kv_grpc
from pagehold.runtime.progress import Progress, read_progress
from pagehold.runtime.statedir import StateDir
from pagehold.v1 import inference_pb2 as api
from tests.unit.kvmanager.files import (
    attach_request,
    close_call,
    ensure_call,
    executor_log,
    key_of,
    manager_of,
    open_call,
    take_lock,
)


class Daemon:
    """A manager behind a socket."""

    def __init__(self, state: StateDir) -> None:
        self.state = state
        self.faults: list[Exception] = []
        self.manager = manager_of(state)
        self.progress = Progress(state.progress("kvmanager"))
        self.servicer = KvManagerServicer(self.manager, self.progress, self.faults.append)

    async def start(self) -> None:
        self.server = grpc.aio.server()
        kv_grpc.add_KvManagerServiceServicer_to_server(self.servicer, self.server)
        self.server.add_insecure_port(f"unix:{self.state.kvmanager_socket}")
        await self.server.start()


class Session:
    """An executor's side of one stream."""

    def __init__(self, stub: kv_grpc.KvManagerServiceStub) -> None:
        self.stream = stub.Session()

    async def ask(self, *calls: kv.Call) -> list[kv.Reply]:
        await self.stream.write(kv.SessionRequest(calls=calls))
        response = await asyncio.wait_for(self.stream.read(), 5)
        assert isinstance(response, kv.SessionResponse), "the stream ended"
        return list(response.replies)

    async def attach(self, executor_id: bytes) -> kv.Reply:
        (reply,) = await self.ask(kv.Call(attach=attach_request(executor_id)))
        return reply


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    daemon = Daemon(StateDir.prepare(tmp_path / "s"))
    await daemon.start()
    yield daemon
    await daemon.server.stop(0)


@pytest.fixture
async def stub(daemon: Daemon) -> AsyncIterator[kv_grpc.KvManagerServiceStub]:
    async with grpc.aio.insecure_channel(f"unix:{daemon.state.kvmanager_socket}") as channel:
        yield kv_grpc.KvManagerServiceStub(channel)


async def until(condition: object) -> None:
    for _ in range(500):
        if condition():  # type: ignore[operator]
            return
        await asyncio.sleep(0.01)
    raise AssertionError("never came true")


async def test_calls_are_answered_in_their_order_one_reply_each(
    daemon: Daemon, stub: kv_grpc.KvManagerServiceStub
) -> None:
    take_lock(daemon.state, b"1" * 16)
    session = Session(stub)
    assert (await session.attach(b"1" * 16)).attach.epoch == 1
    replies = await session.ask(
        open_call("a"),
        open_call("b"),
        open_call("a", digest=b"other"),
        ensure_call("b", 40),
        ensure_call("nobody", 40),
        ensure_call("a", 40),
    )
    kinds = [reply.WhichOneof("reply") for reply in replies]
    assert kinds == ["open", "open", "error", "ensure", "error", "ensure"]
    assert [reply.open.key for reply in replies[:2]] == [key_of("a"), key_of("b")]
    view = read_progress(daemon.state.progress("kvmanager"))
    assert view is not None and view.turn == 2 and view.deadline_ns and not view.overdue


async def test_nothing_is_answered_before_attach(daemon: Daemon, stub: kv_grpc.KvManagerServiceStub) -> None:
    session = Session(stub)
    (reply,) = await session.ask(open_call("a"))
    assert reply.error.reason == kv.ERROR_REASON_STALE_EPOCH
    assert (await session.attach(b"1" * 16)).error.reason == kv.ERROR_REASON_STALE_EPOCH
    (reply,) = await session.ask(open_call("a"))
    assert reply.error.reason == kv.ERROR_REASON_STALE_EPOCH


async def test_the_newest_attach_has_the_session(daemon: Daemon, stub: kv_grpc.KvManagerServiceStub) -> None:
    take_lock(daemon.state, b"1" * 16).release()
    old = Session(stub)
    await old.attach(b"1" * 16)
    await old.ask(open_call("a"))
    take_lock(daemon.state, b"2" * 16)
    new = Session(stub)
    assert (await new.attach(b"2" * 16)).attach.epoch == 2
    (reply,) = await old.ask(ensure_call("a", 40))
    assert reply.error.reason == kv.ERROR_REASON_STALE_EPOCH
    (reply,) = await new.ask(ensure_call("a", 40))
    assert reply.ensure.capacity == 48
    # The old one's end is nothing to the new one.
    old.stream.cancel()
    await asyncio.sleep(0.1)
    (reply,) = await new.ask(close_call("a", reply.ensure.row_generation))
    assert reply.HasField("close")
    assert (await stub.GetStats(kv.GetStatsRequest())).executor_attached


async def test_an_executor_that_comes_back_goes_on_in_its_epoch(
    daemon: Daemon, stub: kv_grpc.KvManagerServiceStub
) -> None:
    take_lock(daemon.state, b"1" * 16)
    session = Session(stub)
    await session.attach(b"1" * 16)
    await session.ask(open_call("a"))
    (granted,) = await session.ask(ensure_call("a", 40))
    session.stream.cancel()
    again = Session(stub)
    reply = await again.attach(b"1" * 16)
    assert reply.attach.epoch == 1 and list(reply.attach.keys) == [key_of("a")]
    (repeated,) = await again.ask(ensure_call("a", 40))
    assert repeated.ensure == granted.ensure


async def test_a_dead_executor_leaves_its_session(daemon: Daemon, stub: kv_grpc.KvManagerServiceStub) -> None:
    assert not (await stub.GetStats(kv.GetStatsRequest())).executor_attached
    take_lock(daemon.state, b"1" * 16)
    async with grpc.aio.insecure_channel(f"unix:{daemon.state.kvmanager_socket}") as channel:
        session = Session(kv_grpc.KvManagerServiceStub(channel))
        await session.attach(b"1" * 16)
        assert (await stub.GetStats(kv.GetStatsRequest())).executor_attached
    await until(lambda: daemon.servicer._current is None)
    stats = await stub.GetStats(kv.GetStatsRequest())
    assert not stats.executor_attached and stats.epoch == 1


async def test_after_a_fault_nothing_more_is_served(daemon: Daemon, stub: kv_grpc.KvManagerServiceStub) -> None:
    take_lock(daemon.state, b"1" * 16)
    session = Session(stub)
    await session.attach(b"1" * 16)

    def explode(*arguments: object) -> None:
        raise KeyError("half-changed")

    assert daemon.manager.core is not None
    daemon.manager.core.ensure = explode  # type: ignore[method-assign, assignment]
    await session.ask(open_call("a"))
    with pytest.raises(grpc.aio.AioRpcError):
        await session.ask(ensure_call("a", 40))
    assert isinstance(daemon.faults[0], KeyError)
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.GetStats(kv.GetStatsRequest())
    view = read_progress(daemon.state.progress("kvmanager"))
    assert view is not None and view.deadline_ns and not view.overdue


async def test_a_live_check_says_what_is_wrong_and_stops_nothing(
    daemon: Daemon, stub: kv_grpc.KvManagerServiceStub
) -> None:
    assert await stub.Fsck(kv.FsckRequest()) == kv.FsckResponse()  # no pool yet
    take_lock(daemon.state, b"1" * 16)
    session = Session(stub)
    await session.attach(b"1" * 16)
    await session.ask(open_call("a"))
    (granted,) = await session.ask(ensure_call("a", 40))
    found = await stub.Fsck(kv.FsckRequest())
    assert (list(found.findings), found.total, found.pages, found.rows, found.records) == ([], 0, 40, 1, 1)
    assert daemon.manager.core is not None
    daemon.manager.core.tables.row_entry[granted.ensure.row, :1100] += 1 << 32
    (daemon.state.records / "zz.tmp").write_bytes(b"")
    found = await stub.Fsck(kv.FsckRequest())
    assert found.total == 4 and {one.kind for one in found.findings} == {"STALE", "FILE"}
    daemon.manager.core.tables.row_entry[granted.ensure.row, :1100] -= 1 << 32
    for number in range(1200):
        (daemon.state.records / f"{number}.tmp").write_bytes(b"")
    found = await stub.Fsck(kv.FsckRequest())
    assert (found.total, len(found.findings)) == (1201, 1000)
    view = read_progress(daemon.state.progress("kvmanager"))
    assert view is not None and view.deadline_ns and not view.overdue
    (reply,) = await session.ask(close_call("a", granted.ensure.row_generation))
    assert reply.HasField("close")


async def test_pins_are_listed_and_given_back(daemon: Daemon, stub: kv_grpc.KvManagerServiceStub) -> None:
    assert await stub.ListPins(kv.ListPinsRequest()) == kv.ListPinsResponse()
    take_lock(daemon.state, b"1" * 16)
    session = Session(stub)
    await session.attach(b"1" * 16)
    request = api.GenerateRequest(pin_prefix="system").SerializeToString()
    await session.ask(open_call("a", request=request))
    (granted,) = await session.ask(ensure_call("a", 40))
    executor_log(daemon.state.records, "a")[0].set_progress(40, 40)
    await session.ask(close_call("a", granted.ensure.row_generation))
    (pin,) = (await stub.ListPins(kv.ListPinsRequest())).pins
    assert pin == kv.Pin(name="system", tenant="default", pages=2, tokens=32)
    assert not (await stub.Unpin(kv.UnpinRequest(tenant="another", name="system"))).existed
    changes = daemon.servicer.changes
    assert (await stub.Unpin(kv.UnpinRequest(tenant="default", name="system"))).existed
    assert daemon.servicer.changes > changes
    assert not (await stub.Unpin(kv.UnpinRequest(tenant="default", name="system"))).existed
    assert not (await stub.ListPins(kv.ListPinsRequest())).pins


async def test_findings_between_calls_are_in_the_figures(daemon: Daemon, stub: kv_grpc.KvManagerServiceStub) -> None:
    assert (await stub.GetStats(kv.GetStatsRequest())).integrity_findings == 0
    daemon.servicer.findings = 3
    assert (await stub.GetStats(kv.GetStatsRequest())).integrity_findings == 3
