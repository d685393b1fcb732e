"""Messages to frontends: bounded in number and size, complete in the end."""

from __future__ import annotations

import asyncio
from collections import deque
from pathlib import Path

import pytest

from pagehold.executor.v1 import executor_pb2 as ex
from services.executor import publisher
from services.executor.publisher import Connection
from services.executor.runner.base import Chunk
from tests.unit.executor.checking_runner import expected
from tests.unit.executor.test_engine import prompt_of
from tests.unit.executor.world import Clock, Frontend, World


class Counting(Frontend):
    """Keeps the size of every message."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int]] = []  # tokens, bytes

    def offer(self, message: ex.ConnectResponse) -> None:
        self.sizes.append((len(message.tokens.token_ids), message.ByteSize()))
        super().offer(message)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "state", pages=400)


def connect(world: World) -> Counting:
    frontend = Counting()
    from services.executor.inbox import Connected

    world.inbox.put(Connected(frontend))
    return frontend


def test_a_resumed_crowd_comes_in_messages_of_bounded_size(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    first = world.connect()
    for number in range(1, 21):
        world.submit(first, number, prompt_of(number, 20), 50)
    world.run()
    monkeypatch.setattr(publisher, "_MOST_TOKENS", 200)
    frontend = connect(world)
    for number in range(1, 21):
        world.send(frontend, attach=ex.Attach(stream_id=number, tenant="default", request_id=f"r{number}"))
    world.run()
    assert max(tokens for tokens, _ in frontend.sizes) <= 250
    for number in range(1, 21):
        assert frontend.stream(number).tokens[0] == expected(prompt_of(number, 20), 50)
        assert frontend.stream(number).ended[0].length == 50


def test_records_for_a_crowd_are_bounded_and_come_before_their_tokens(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = world.connect()
    for number in range(1, 13):
        world.submit(first, number, prompt_of(number, 20), 10, model="m" * 10_000)
    world.run()
    monkeypatch.setattr(publisher, "_MOST_RECORD_BYTES", 25_000)

    class Ordered(Counting):
        def offer(self, message: ex.ConnectResponse) -> None:
            super().offer(message)
            for stream_id in message.tokens.stream_ids:
                assert self.stream(stream_id).records, "tokens before the record"

    frontend = Ordered()
    from services.executor.inbox import Connected

    world.inbox.put(Connected(frontend))
    for number in range(1, 13):
        attach = ex.Attach(stream_id=number, tenant="default", request_id=f"r{number}", describe=True)
        world.send(frontend, attach=attach)
    world.run()
    assert max(size for _, size in frontend.sizes) < 35_000
    for number in range(1, 13):
        heard = frontend.stream(number)
        assert len(heard.records) == 1 and heard.tokens[0] == expected(prompt_of(number, 20), 10)


def test_a_request_without_a_token_yet_is_described_too(world: World) -> None:
    first = world.connect()
    world.submit(first, 1, prompt_of(1, 20), 10)
    world.turn()
    frontend = world.connect()
    world.send(frontend, attach=ex.Attach(stream_id=5, tenant="default", request_id="r1", describe=True))
    world.turn()
    world.run()
    assert len(frontend.stream(5).records) == 1


def test_logprobs_are_columns_of_the_same_length(world: World) -> None:
    frontend = world.connect()
    seen: list[tuple[int, int]] = []
    real = frontend.offer

    def offer(message: ex.ConnectResponse) -> None:
        seen.append((len(message.tokens.token_ids), len(message.tokens.logprobs)))
        real(message)

    frontend.offer = offer  # type: ignore[method-assign]
    world.submit(frontend, 1, prompt_of(1, 20), 10)
    world.run()
    assert all(logprobs == 0 for _, logprobs in seen)
    seen.clear()
    world.submit(frontend, 2, prompt_of(2, 20), 10, response={"logprobs": True})
    world.submit(frontend, 3, prompt_of(3, 20), 10)
    world.run()
    assert all(tokens == logprobs for tokens, logprobs in seen) and sum(tokens for tokens, _ in seen) == 20


@pytest.fixture
def paced(tmp_path: Path) -> World:
    """Messages that can wait lie 20 ms apart, and a turn takes no time."""
    return World(tmp_path / "state", pages=400, clock=Clock(), stream_interval=0.02)


def test_tokens_wait_for_each_other_but_not_the_first_and_the_last(paced: World) -> None:
    frontend, clock = connect(paced), paced.clock
    assert isinstance(clock, Clock)
    paced.submit(frontend, 1, prompt_of(1, 20), 20)
    while 1 not in frontend.heard or not frontend.stream(1).ended:
        clock.now += 0.0051
        paced.turn()
    assert [tokens for tokens, _ in frontend.sizes if tokens] == [1, 3, 4, 4, 4, 4]
    assert frontend.stream(1).tokens[0] == expected(prompt_of(1, 20), 20)


def test_who_waits_for_a_first_token_takes_those_of_others_along(paced: World) -> None:
    frontend = connect(paced)
    paced.submit(frontend, 1, prompt_of(1, 20), 100)
    for _ in range(10):
        paced.turn()
    assert len(frontend.stream(1).tokens[0]) == 1
    paced.submit(frontend, 2, prompt_of(2, 20), 100)
    for _ in range(10):
        paced.turn()
    assert len(frontend.stream(2).tokens[0]) == 1
    assert 1 < len(frontend.stream(1).tokens[0]) < paced.sequence(1).length


def test_no_token_waits_where_no_step_would_send_it(paced: World) -> None:
    frontend = connect(paced)
    paced.submit(frontend, 1, prompt_of(1, 20), 300)
    for _ in range(5):
        paced.turn()
    paced.away = True
    paced.run()
    assert 1 < paced.sequence(1).length < 300, "it has not run out of pages"
    assert len(frontend.stream(1).tokens[0]) == paced.sequence(1).length


def test_no_token_waits_for_a_prompt(paced: World, monkeypatch: pytest.MonkeyPatch) -> None:
    frontend = connect(paced)
    paced.submit(frontend, 1, prompt_of(1, 20), 100)
    for _ in range(10):
        paced.turn()
    waited: list[int] = []
    real = paced.runner.submit

    def submit(chunks: list[Chunk]) -> object:
        if any(chunk.count > 1 for chunk in chunks):
            waited.append(paced.sequence(1).length - len(frontend.stream(1).tokens[0]))
        return real(chunks)

    monkeypatch.setattr(paced.runner, "submit", submit)
    assert paced.sequence(1).length > len(frontend.stream(1).tokens[0])
    paced.submit(frontend, 2, prompt_of(2, 150), 10)
    for _ in range(10):
        paced.turn()
    assert len(waited) > 1 and set(waited) == {0}


def test_who_comes_back_waits_for_nothing(paced: World) -> None:
    frontend = connect(paced)
    paced.submit(frontend, 1, prompt_of(1, 20), 100)
    for _ in range(10):
        paced.turn()
    paced.send(frontend, detach=ex.Detach(stream_id=1, grace_ms=60_000))
    attach = ex.Attach(stream_id=5, tenant="default", request_id="r1")
    attach.positions.add(index=0, offset=3)
    paced.send(frontend, attach=attach)
    paced.engine.handle(paced.inbox.take(0))
    assert len(frontend.stream(5).tokens[0]) == paced.sequence(1).length - 3 > 0


async def test_at_most_four_messages_are_on_their_way_and_room_is_told_once() -> None:
    woken: deque[int] = deque()
    connection = Connection(asyncio.get_running_loop(), lambda: woken.append(1))
    for number in range(4):
        assert connection.has_room
        connection.offer(ex.ConnectResponse(ended=[ex.Ended(length=number)]))
    assert not connection.has_room
    for number in range(4):
        assert (await connection.take()).ended[0].length == number
        connection.written()
    assert connection.has_room and len(woken) == 1


def test_a_closed_connection_is_offered_nothing(world: World) -> None:
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 20), 40)
    for _ in range(5):
        world.turn()
    before = len(frontend.stream(1).tokens[0])
    world.disconnect(frontend)
    world.run()
    assert len(frontend.stream(1).tokens[0]) == before and not frontend.dirty and not frontend.streams
