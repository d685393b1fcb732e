"""What frontends may send at any time: before the record is open, after the end, twice, too late."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from kvmanager.keys import request_key
from kvmanager.layout import Reason, RequestLog
from pagehold.executor.v1 import executor_pb2 as ex
from services.executor.requests import LOST_FRONTEND_GRACE
from tests.unit.executor.checking_runner import expected
from tests.unit.executor.test_engine import prompt_of
from tests.unit.executor.world import Clock, Frontend, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "state")


def named(name: str = "r1") -> dict[str, str]:
    return {"tenant": "default", "request_id": name}


def opening(world: World, tokens: int = 30) -> Frontend:
    """A frontend whose request is on its way to a manager that does not answer."""
    frontend = world.connect()
    world.away = True
    world.submit(frontend, 1, prompt_of(1, 20), tokens)
    world.turn()
    assert [call.WhichOneof("call") for call in world.unanswered] == ["open"]
    return frontend


def terminal(world: World, name: str = "r1") -> tuple[Reason, int]:
    """What is stored, whoever has it in memory."""
    log = (world.state.records / f"{request_key('default', name)}.log").read_bytes()
    output = RequestLog(memoryview(log)).outputs[0]
    assert output.ended
    return output.reason, output.final_length


def until_dropped(world: World) -> None:
    """Whatever has ended and was read leaves the memory: it is looked for every few milliseconds."""
    deadline = time.monotonic() + 3
    while world.requests.live or len(world.requests.openings):
        assert time.monotonic() < deadline, "still in memory"
        world.turn()


# --- before the record is open ---


@pytest.mark.parametrize("record_is_written", [False, True])
def test_a_cancel_is_not_lost_while_the_request_is_being_opened(world: World, record_is_written: bool) -> None:
    frontend = opening(world)
    if record_is_written:  # only the answer is on its way
        world.manager.call(world.unanswered[0])
    world.send(frontend, cancel=ex.Cancel(**named()))
    world.turn()
    world.answer()
    world.run()
    heard = frontend.stream(1)
    assert heard.accepted == 1 and heard.ended[0].reason == ex.END_REASON_CANCELLED and not heard.tokens
    assert terminal(world) == (Reason.CANCELLED, 0)
    assert world.runner.steps == 0
    until_dropped(world)


@pytest.mark.parametrize("record_is_written", [False, True])
def test_a_stop_at_while_the_request_is_being_opened_ends_nothing(world: World, record_is_written: bool) -> None:
    frontend = opening(world)
    if record_is_written:
        world.manager.call(world.unanswered[0])
    world.send(frontend, stop_at=ex.StopAt(index=0, length=0, **named()))
    world.turn()
    world.answer()
    world.run()
    assert frontend.stream(1).tokens[0] == expected(prompt_of(1, 20), 30)


def test_detached_without_grace_before_it_was_open_it_is_cancelled_at_once(world: World) -> None:
    frontend = opening(world, tokens=900)
    world.send(frontend, detach=ex.Detach(stream_id=1, grace_ms=0))
    world.turn()
    world.answer()
    until_dropped(world)
    assert terminal(world)[0] is Reason.CANCELLED
    assert world.manager.core is not None and not world.manager.core.live_rows


def test_a_frontend_lost_before_the_answer_leaves_a_request_that_goes_on(world: World) -> None:
    frontend = opening(world)
    world.disconnect(frontend)
    world.turn()
    world.answer()
    world.run()
    assert terminal(world) == (Reason.LENGTH, 30)


def test_the_newest_stream_wins_before_the_request_is_open(world: World) -> None:
    first = opening(world)
    second, third = world.connect(), world.connect()
    world.submit(second, 7, prompt_of(1, 20), 30, name="r1")
    world.turn()
    attach = ex.Attach(stream_id=9, describe=True, **named())
    attach.positions.add(index=0, offset=0)
    world.send(third, attach=attach)
    world.turn()
    world.answer()
    world.run()
    assert first.stream(1).failures == second.stream(7).failures == [ex.FAILURE_TAKEN_OVER]
    assert not first.stream(1).tokens and not second.stream(7).tokens
    assert third.stream(9).records[0].prompt_tokens == 20


def test_an_attach_between_the_record_and_its_answer_keeps_the_request(world: World) -> None:
    first = opening(world)
    world.manager.call(world.unanswered[0])
    second = world.connect()
    world.send(second, attach=ex.Attach(stream_id=9, **named()))
    world.turn()
    world.answer()
    world.run()
    assert first.stream(1).failures == [ex.FAILURE_TAKEN_OVER]
    assert second.stream(9).tokens[0] == expected(prompt_of(1, 20), 30)


def test_a_stream_that_submits_twice_does_not_take_over_from_itself(world: World) -> None:
    frontend = opening(world)
    world.submit(frontend, 1, prompt_of(1, 20), 30)
    world.turn()
    world.answer()
    world.run()
    assert frontend.stream(1).failures == [] and frontend.stream(1).tokens[0] == expected(prompt_of(1, 20), 30)


def test_a_manager_that_restarts_between_the_record_and_its_answer(world: World) -> None:
    frontend = opening(world)
    world.manager.call(world.unanswered[0])
    world.restart_manager()
    world.turn()
    world.answer()  # sent again on the next stream
    world.run()
    assert frontend.stream(1).accepted == 1
    assert frontend.stream(1).tokens[0] == expected(prompt_of(1, 20), 30)


def test_what_waits_for_the_manager_is_bounded_in_bytes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.executor.openings._MOST_BYTES", 200)
    frontend = opening(world)
    for number in (2, 3, 4):
        world.submit(frontend, number, prompt_of(number, 60), 30)
    world.turn()
    assert len(world.unanswered) == 2
    assert frontend.stream(3).failures == frontend.stream(4).failures == [ex.FAILURE_OVERLOADED]
    world.answer()
    world.run()
    assert frontend.stream(2).tokens[0] == expected(prompt_of(2, 60), 30)
    world.submit(frontend, 5, prompt_of(5, 60), 30)
    world.run()
    assert frontend.stream(5).tokens[0] == expected(prompt_of(5, 60), 30)


def test_what_a_frontend_should_never_send_costs_only_its_stream(world: World) -> None:
    frontend = world.connect()
    broken = ex.Submit(stream_id=1, tenant="default", request=b"\xff\xff", digest=b"d", prompt=[5], max_tokens=3)
    world.send(frontend, submit=broken)
    world.submit(frontend, 2, prompt_of(2, 20), 30)
    world.inbox._events[-1].message.submit.timeout_ms = (1 << 64) - 1  # type: ignore[union-attr]
    world.run()
    assert frontend.stream(1).failures == [ex.FAILURE_UNSPECIFIED]
    assert frontend.stream(2).tokens[0] == expected(prompt_of(2, 20), 30)


# --- with an `ensure` on its way ---


@pytest.mark.parametrize("started", [False, True])
def test_a_request_that_ends_while_it_asks_for_pages_is_dropped(world: World, started: bool) -> None:
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 20), 400)
    for _ in range(20 if started else 2):
        world.turn()
    world.away = True
    while not world.sequence().asking:
        world.turn()
    world.send(frontend, cancel=ex.Cancel(**named()))
    world.turn()
    world.answer()
    until_dropped(world)
    assert frontend.stream(1).ended[0].reason == ex.END_REASON_CANCELLED
    assert world.manager.core is not None and not world.manager.core.live_rows


# --- after the end ---


def finished(world: World, tokens: int = 30) -> Frontend:
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 20), tokens)
    world.run()
    until_dropped(world)
    return frontend


def test_a_late_stop_at_shortens_and_never_lengthens(world: World) -> None:
    frontend = finished(world)
    world.send(frontend, stop_at=ex.StopAt(index=0, length=12, **named()))
    world.turn()
    assert terminal(world) == (Reason.STOP, 12)
    world.send(frontend, stop_at=ex.StopAt(index=0, length=13, **named()))
    world.send(frontend, stop_at=ex.StopAt(index=9, length=1, **named()))
    world.turn()
    assert terminal(world) == (Reason.STOP, 12)
    other = world.connect()
    world.send(other, attach=ex.Attach(stream_id=2, **named()))
    world.run()
    assert other.stream(2).tokens[0] == expected(prompt_of(1, 20), 12)
    assert (other.stream(2).ended[0].reason, other.stream(2).ended[0].length) == (ex.END_REASON_STOP, 12)


def test_a_late_cancel_changes_nothing(world: World) -> None:
    frontend = finished(world)
    world.send(frontend, cancel=ex.Cancel(**named()))
    world.send(frontend, cancel=ex.Cancel(**named("nobody")))
    world.run()
    assert terminal(world) == (Reason.LENGTH, 30)


def test_an_ended_request_can_be_resumed_from_any_position(world: World) -> None:
    finished(world)
    world.start_executor()
    frontend = world.connect()
    for stream_id, offset in ((2, 0), (3, 17), (4, 30)):
        attach = ex.Attach(stream_id=stream_id, **named())
        attach.positions.add(index=0, offset=offset)
        world.send(frontend, attach=attach)
        world.run()
        heard = frontend.stream(stream_id)
        assert heard.tokens.get(0, []) == expected(prompt_of(1, 20), 30)[offset:]
        assert heard.ended[0].length == 30


def test_a_damaged_record_is_not_found_and_stops_nobody(world: World) -> None:
    finished(world)
    (world.state.records / f"{request_key('default', 'r1')}.log").write_bytes(b"nonsense")
    frontend = world.connect()
    world.send(frontend, attach=ex.Attach(stream_id=2, **named()))
    world.submit(frontend, 3, prompt_of(3, 20), 30)
    world.run()
    assert frontend.stream(2).failures == [ex.FAILURE_NOT_FOUND]
    assert frontend.stream(3).tokens[0] == expected(prompt_of(3, 20), 30)


def test_progress_that_no_row_stands_behind_is_taken_back(world: World) -> None:
    """The manager makes no row for an output that claims to be computed: the executor says first that it is not."""
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 20), 200)
    for _ in range(30):
        world.turn()
    sequence, core = world.sequence(), world.manager.core
    assert sequence.log.computed > 20 and core is not None
    core.close(sequence.request.key, 0, sequence.row_generation)
    world.start_executor()
    frontend = world.connect()
    world.send(frontend, attach=ex.Attach(stream_id=1, **named()))
    world.run()
    assert frontend.stream(1).failures == []
    assert frontend.stream(1).tokens[0] == expected(prompt_of(1, 20), 200)


# --- time ---


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timed(tmp_path: Path, clock: Clock) -> World:
    return World(tmp_path / "timed", clock=clock)


def submit_with_deadline(world: World, frontend: Frontend, timeout_ms: int) -> None:
    world.submit(frontend, 1, prompt_of(1, 20), 400)
    world.inbox._events[-1].message.submit.timeout_ms = timeout_ms  # type: ignore[union-attr]


def test_a_deadline_ends_a_request(timed: World, clock: Clock) -> None:
    frontend = timed.connect()
    submit_with_deadline(timed, frontend, 5000)
    for _ in range(20):
        timed.turn()
    clock.now += 4.9
    timed.turn()
    assert not frontend.stream(1).failures
    clock.now += 0.2
    timed.run()
    assert frontend.stream(1).failures == [ex.FAILURE_DEADLINE]
    assert terminal(timed)[0] is Reason.CANCELLED


def test_a_deadline_outlives_executor_and_manager(timed: World, clock: Clock) -> None:
    frontend = timed.connect()
    submit_with_deadline(timed, frontend, 5000)
    for _ in range(20):
        timed.turn()
    clock.now += 4
    timed.manager = timed._new_manager()
    timed.start_executor()
    timed.turn()
    assert not timed.sequence().log.ended
    clock.now += 1.1
    timed.run()
    assert terminal(timed)[0] is Reason.CANCELLED


def test_what_nobody_claims_after_a_restart_goes_when_its_grace_is_over(timed: World, clock: Clock) -> None:
    frontend = timed.connect()
    timed.submit(frontend, 1, prompt_of(1, 20), 900)
    timed.submit(frontend, 2, prompt_of(2, 20), 900, response={"detach_grace": {"seconds": 100}})
    for _ in range(10):
        timed.turn()
    clock.now += 1000
    timed.start_executor()
    timed.turn()
    clock.now += LOST_FRONTEND_GRACE - 1
    timed.turn()
    assert len(timed.requests.live) == 2
    clock.now += 2
    timed.turn()
    assert terminal(timed)[0] is Reason.CANCELLED
    assert not timed.sequence("r2").log.ended
    clock.now += 70
    timed.turn()
    assert terminal(timed, "r2")[0] is Reason.CANCELLED


# --- the best of several, and reserved prefixes ---


@pytest.mark.parametrize(
    ("fields", "outputs", "logprobs"),
    [
        ({}, 1, False),
        ({"n": 2}, 2, False),
        ({"n": 2, "best_of": 2}, 2, False),
        ({"n": 2, "best_of": 5}, 5, True),
        ({"best_of": 3}, 3, True),
        ({"n": 2, "response": {"logprobs": True}}, 2, True),
    ],
)
def test_what_is_sampled_for_the_best_of_several(
    world: World, fields: dict[str, object], outputs: int, logprobs: bool
) -> None:
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 20), 10, **fields)
    while not frontend.stream(1).accepted:
        world.turn()
    request = world.requests.live[request_key("default", "r1")]
    assert len(request.sequences) == request.record.outputs == outputs
    assert all((sequence.log.logprobs is not None) == logprobs for sequence in request.sequences)
    assert all(sequence.lane.sampling.logprobs == logprobs for sequence in request.sequences)
    world.run()
    for index in range(outputs):
        assert frontend.stream(1).tokens[index] == expected(prompt_of(1, 20), 10, index=index)


def test_a_prefix_is_reserved_only_where_prefixes_are_cached(world: World) -> None:
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 40), 10, pin_prefix="system")
    world.run()
    assert frontend.stream(1).failures == []
    assert world.manager.core is not None and len(world.manager.core.pins.pages) == 2
    world.prefix_cache = False
    world.start_executor()
    frontend = world.connect()
    world.submit(frontend, 2, prompt_of(1, 40), 10, pin_prefix="system")
    world.submit(frontend, 3, prompt_of(1, 40), 10)
    world.run()
    assert frontend.stream(2).failures == [ex.FAILURE_NO_PREFIX_CACHE]
    assert frontend.stream(3).tokens[0] == expected(prompt_of(1, 40), 10)


def test_positions_in_ranked_outputs_are_not_those_of_the_sampled_ones(world: World) -> None:
    frontend = world.connect()
    world.submit(frontend, 1, [5, 6], 4, n=1, best_of=3)
    world.run()
    positions = [ex.Position(index=0, offset=99)]
    for stream_id, describe, failures in ((2, True, []), (3, False, [ex.FAILURE_OUT_OF_RANGE])):
        attach = ex.Attach(stream_id=stream_id, **named(), positions=positions, describe=describe)
        world.send(frontend, attach=attach)
        world.run()
        assert frontend.stream(stream_id).failures == failures
