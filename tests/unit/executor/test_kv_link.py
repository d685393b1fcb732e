"""The stream to the manager, against a server that breaks it wherever a script says."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.kv.v1 import kv_manager_pb2_grpc as kv_grpc
from services.executor import kv_link
from services.executor.kv_link import KvLink, ProtocolError

Answer = Callable[[kv.Call], kv.Reply]


def call(number: int) -> kv.Call:
    """Three kinds in turn; each carries its number."""
    match number % 3:
        case 0:
            return kv.Call(ensure=kv.EnsureRequest(key="k", capacity=number))
        case 1:
            return kv.Call(open=kv.OpenRequest(record=kv.RequestRecord(request_id=str(number))))
        case _:
            return kv.Call(close=kv.CloseRequest(key="k", row_generation=number))


def number_of(asked: kv.Call) -> int:
    match asked.WhichOneof("call"):
        case "ensure":
            return asked.ensure.capacity
        case "open":
            return int(asked.open.record.request_id)
        case _:
            return asked.close.row_generation


def honest(asked: kv.Call) -> kv.Reply:
    match asked.WhichOneof("call"):
        case "attach":
            return kv.Reply(attach=kv.AttachResponse(epoch=1))
        case "ensure":
            return kv.Reply(ensure=kv.EnsureResponse(capacity=asked.ensure.capacity))
        case "open":
            return kv.Reply(open=kv.OpenResponse(key=asked.open.record.request_id))
        case _:
            return kv.Reply(close=kv.CloseResponse())


@dataclass
class Script:
    """What a manager does on one stream."""

    breaks_at: int = 1 << 30  # calls received in whole; the one after them is not answered
    mute_from: int = 1 << 30  # replies kept back from here on: done, but the answer is lost
    abort: bool = True  # an error, else an orderly end
    answer: Answer = honest


@dataclass
class Manager(kv_grpc.KvManagerServiceServicer):
    scripts: list[Script] = field(default_factory=list)  # for the first streams; the rest is honest
    streams: list[list[kv.Call]] = field(default_factory=list)
    messages: list[int] = field(default_factory=list)  # calls in each

    async def Session(
        self, requests: AsyncIterator[kv.SessionRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[kv.SessionResponse]:
        script = self.scripts.pop(0) if self.scripts else Script()
        seen: list[kv.Call] = []
        self.streams.append(seen)
        async for request in requests:
            self.messages.append(len(request.calls))
            replies = []
            for asked in request.calls:
                if len(seen) == script.breaks_at:
                    yield kv.SessionResponse(replies=replies)
                    if script.abort:
                        await context.abort(grpc.StatusCode.UNAVAILABLE, "scripted")
                    return
                seen.append(asked)
                if len(seen) <= script.mute_from:
                    replies.append(script.answer(asked))
            if replies:
                yield kv.SessionResponse(replies=replies)


class World:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.manager = Manager()
        self.attached = 0
        self.replied: list[tuple[kv.Call, kv.Reply]] = []
        self.fatal: list[kv.Error] = []
        self.changed = asyncio.Event()
        self.link = KvLink(f"unix:{path}", self._attach, self._on_attach, self._on_reply, self._on_fatal)
        self.server: grpc.aio.Server | None = None

    async def _attach(self) -> kv.AttachRequest:
        return kv.AttachRequest(executor_id=b"1" * 16)

    def _on_attach(self, response: kv.AttachResponse) -> None:
        self.attached += 1
        self.changed.set()

    def _on_reply(self, asked: kv.Call, reply: kv.Reply) -> None:
        self.replied.append((asked, reply))
        self.changed.set()

    def _on_fatal(self, error: kv.Error) -> None:
        self.fatal.append(error)
        self.changed.set()

    async def start(self) -> None:
        self.server = grpc.aio.server(options=[("grpc.max_receive_message_length", 64 << 20)])
        kv_grpc.add_KvManagerServiceServicer_to_server(self.manager, self.server)
        self.server.add_insecure_port(f"unix:{self.path}")
        await self.server.start()

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop(0)
            self.server = None

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path / "s")
    await world.start()
    yield world
    await world.stop()


@pytest.fixture
async def running(world: World) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(world.link.run())
    yield task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def check(world: World, count: int) -> None:
    """Every call was answered once, with its own answer, in the order of sending."""
    assert [number_of(asked) for asked, _ in world.replied] == list(range(count))
    for asked, reply in world.replied:
        assert reply == honest(asked)
    for stream in world.manager.streams:
        if stream:
            assert stream[0].HasField("attach") and not any(one.HasField("attach") for one in stream[1:])
            numbers = [number_of(one) for one in stream[1:]]
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True


async def test_answers_go_to_their_calls(world: World, running: asyncio.Task[None]) -> None:
    for start in range(0, 30, 5):
        world.link.send([call(number) for number in range(start, start + 5)])
        await asyncio.sleep(0.001)
    await world.until(lambda: len(world.replied) == 30)
    check(world, 30)
    assert world.attached == 1 and len(world.manager.streams) == 1


@pytest.mark.parametrize("abort", [False, True])
@pytest.mark.parametrize("place", range(8))
async def test_a_stream_that_breaks_anywhere_is_taken_up_again(
    world: World, running: asyncio.Task[None], place: int, abort: bool
) -> None:
    world.manager.scripts = [Script(breaks_at=place, abort=abort)]
    world.link.send([call(number) for number in range(6)])
    await world.until(lambda: len(world.replied) == 6)
    check(world, 6)
    assert len(world.manager.streams) == (2 if place < 7 else 1)


@pytest.mark.parametrize("muted", range(1, 7))
async def test_calls_whose_answer_was_lost_are_sent_again_and_no_others(
    world: World, running: asyncio.Task[None], muted: int
) -> None:
    world.manager.scripts = [Script(mute_from=muted)]
    world.link.send([call(number) for number in range(6)])
    await world.until(lambda: len(world.replied) == muted - 1)
    for _ in range(200):
        if world.manager.streams and len(world.manager.streams[0]) == 7:
            break
        await asyncio.sleep(0.01)
    await world.stop()
    await world.start()
    await world.until(lambda: len(world.replied) == 6)
    check(world, 6)
    assert [number_of(one) for one in world.manager.streams[1][1:]] == list(range(muted - 1, 6))


@pytest.mark.parametrize("seed", range(6))
async def test_many_breaks(world: World, running: asyncio.Task[None], seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(12):
        breaks_at, mute_from = rng.randint(0, 25), rng.choice([1 << 30, rng.randint(0, 25)])
        world.manager.scripts.append(Script(breaks_at, mute_from, rng.random() < 0.5))
    sent = 0
    while sent < 120:
        more = rng.randint(1, 12)
        world.link.send([call(number) for number in range(sent, sent + more)])
        sent += more
        await asyncio.sleep(rng.choice([0, 0, 0.001, 0.02]))
    await world.until(lambda: len(world.replied) == sent)
    check(world, sent)


async def test_calls_are_kept_while_there_is_no_manager(tmp_path: Path) -> None:
    world = World(tmp_path / "s")
    task = asyncio.create_task(world.link.run())
    for number in range(0, 40, 4):
        world.link.send([call(one) for one in range(number, number + 4)])
        await asyncio.sleep(0.01)
    assert not world.link.connected and not task.done()
    await world.start()
    await world.until(lambda: len(world.replied) == 40)
    check(world, 40)
    task.cancel()
    await world.stop()


async def test_what_piled_up_goes_out_in_small_messages(
    world: World, running: asyncio.Task[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_link, "_MOST_CALLS", 16)
    world.link.send([call(number) for number in range(100)])
    await world.until(lambda: len(world.replied) == 100)
    check(world, 100)
    assert max(world.manager.messages) == 16


async def test_large_calls_go_one_by_one(
    world: World, running: asyncio.Task[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_link, "_MOST_BYTES", 1000)
    large = kv.RequestRecord(request_id="1", prompt=range(1000))
    calls = [call(0), kv.Call(open=kv.OpenRequest(record=large)), call(2), call(3)]
    world.link.send(calls)
    await world.until(lambda: len(world.replied) == 4)
    check(world, 4)
    assert world.manager.messages == [1, 1, 1, 2]


async def test_more_than_one_message_can_hold_still_gets_through(world: World, running: asyncio.Task[None]) -> None:
    """A hundred megabytes of requests, after the manager was away: the limit of a message is 64 MiB."""
    text = b"x" * (10 << 20)
    world.link.send(
        [kv.Call(open=kv.OpenRequest(record=kv.RequestRecord(request_id=str(n), request=text))) for n in range(10)]
    )
    await world.until(lambda: len(world.replied) == 10)
    assert [reply.open.key for _, reply in world.replied] == [str(number) for number in range(10)]


@pytest.mark.parametrize(
    "reason", [kv.ERROR_REASON_STALE_EPOCH, kv.ERROR_REASON_WRONG_MODEL, kv.ERROR_REASON_NO_MEMORY]
)
async def test_a_refused_attach_is_for_good(world: World, running: asyncio.Task[None], reason: kv.ErrorReason) -> None:
    def refuse(asked: kv.Call) -> kv.Reply:
        return kv.Reply(error=kv.Error(reason=reason, message="no"))

    world.manager.scripts = [Script(answer=refuse)]
    world.link.send([call(0)])
    await asyncio.wait_for(running, 5)
    assert [error.reason for error in world.fatal] == [reason] and not world.attached and not world.replied


async def test_an_executor_that_was_replaced_hears_it_in_any_answer(world: World, running: asyncio.Task[None]) -> None:
    def replaced(asked: kv.Call) -> kv.Reply:
        if asked.HasField("close"):
            return kv.Reply(error=kv.Error(reason=kv.ERROR_REASON_STALE_EPOCH, message="another one is attached"))
        return honest(asked)

    world.manager.scripts = [Script(answer=replaced)]
    world.link.send([call(number) for number in range(6)])
    await asyncio.wait_for(running, 5)
    assert world.fatal[0].reason == kv.ERROR_REASON_STALE_EPOCH
    assert [number_of(asked) for asked, _ in world.replied] == [0, 1]


async def test_other_errors_are_answers(world: World, running: asyncio.Task[None]) -> None:
    def full(asked: kv.Call) -> kv.Reply:
        if asked.HasField("ensure"):
            return kv.Reply(error=kv.Error(reason=kv.ERROR_REASON_NO_PAGES, message="full"))
        return honest(asked)

    world.manager.scripts = [Script(answer=full)]
    world.link.send([call(number) for number in range(3)])
    await world.until(lambda: len(world.replied) == 3)
    assert [reply.WhichOneof("reply") for _, reply in world.replied] == ["error", "open", "close"]


async def test_an_answer_of_the_wrong_kind_is_not_passed_on(world: World, running: asyncio.Task[None]) -> None:
    def confused(asked: kv.Call) -> kv.Reply:
        return kv.Reply(trim=kv.TrimResponse()) if asked.HasField("open") else honest(asked)

    world.manager.scripts = [Script(answer=confused)]
    world.link.send([call(number) for number in range(3)])
    with pytest.raises(ProtocolError, match="`open` was answered with `trim`"):
        await asyncio.wait_for(running, 5)
    assert len(world.replied) == 1


async def test_a_callback_that_fails_ends_the_link_loudly(world: World) -> None:
    def explode(response: kv.AttachResponse) -> None:
        raise OSError("cannot map the pool")

    world.link._on_attach = explode
    with pytest.raises(OSError, match="cannot map the pool"):
        await asyncio.wait_for(world.link.run(), 5)
