"""Rows asked for ahead of need, and room made when there is none: who waits for whom, who gives way."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.kv.v1 import kv_manager_pb2 as kv
from services.executor import admission
from services.executor.scheduler import Scheduler
from services.executor.sequence import Phase, Sequence
from tests.unit.executor.checking_runner import expected
from tests.unit.executor.test_engine import prompt_of
from tests.unit.executor.world import Clock, Frontend, World

PAGE_SIZE = 16


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "state"


def tokens_of(frontend: Frontend, number: int) -> list[int]:
    return frontend.stream(number).tokens.get(0, [])


def test_a_large_request_is_not_overtaken_for_ever(root: Path) -> None:
    """Small ones come all the time and would always fit; the large one needs nearly the whole pool."""
    world = World(root, pages=20)
    frontend = world.connect()
    for number in range(1, 5):
        world.submit(frontend, number, prompt_of(number, 40), 60)
    for _ in range(10):
        world.turn()
    world.submit(frontend, 100, prompt_of(100, 280), 20)
    next_number = 5
    for _ in range(2000):
        while len(world.engine.scheduler.waiting) < 6:
            world.submit(frontend, next_number, prompt_of(next_number, 40), 60)
            next_number += 1
            world.turn()
        world.turn()
        if tokens_of(frontend, 100):
            break
    else:
        pytest.fail(f"{next_number} small requests went before it")
    assert next_number < 30


def test_those_behind_a_large_one_go_on_when_it_is_cancelled(root: Path) -> None:
    world = World(root, pages=20)
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 40), 200)
    for _ in range(10):
        world.turn()
    world.submit(frontend, 2, prompt_of(2, 280), 20)
    for _ in range(3):
        world.turn()
    world.submit(frontend, 3, prompt_of(3, 20), 20)
    for _ in range(3):
        world.turn()
    assert world.sequence(3).phase is Phase.WAITING
    world.send(frontend, cancel=ex.Cancel(tenant="default", request_id="r2"))
    for _ in range(5):
        world.turn()
    assert world.sequence(3).phase is Phase.RUNNING and not frontend.stream(1).ended


def test_pages_that_nobody_here_holds_are_waited_for_without_haste(root: Path) -> None:
    clock = Clock()
    world = World(root, pages=20, clock=clock)
    frontend, core = world.connect(), world.manager.core
    assert core is not None
    # A row that this executor knows nothing of.
    record = kv.RequestRecord(tenant="x", request_id="x", prompt=range(200), digest=b"d", outputs=1, max_tokens=9)
    key = world.manager.call(kv.Call(open=kv.OpenRequest(record=record))).open.key
    row = core.ensure(key, 0, 200, 0, 0)
    asked: list[kv.Call] = []
    real = world._send

    def keep(calls: list[kv.Call]) -> None:
        asked.extend(call for call in calls if call.HasField("ensure"))
        real(calls)

    world.engine._send = keep
    world.submit(frontend, 1, prompt_of(1, 200), 20)
    for _ in range(30):
        world.turn()
    assert len(asked) == 1
    clock.now += 0.1
    for _ in range(30):
        world.turn()
    assert len(asked) == 2
    core.close(key, 0, row.generation)
    clock.now += 0.1
    world.run()
    assert tokens_of(frontend, 1) == expected(prompt_of(1, 200), 20)


def test_a_parked_output_gives_way_to_one_that_is_read(root: Path) -> None:
    world = World(root, pages=20, park_after=32)
    frontend, leaving = world.connect(), world.connect()
    world.submit(leaving, 1, prompt_of(1, 200), 100)
    while len(tokens_of(leaving, 1)) < 40:
        world.turn()
    world.send(leaving, detach=ex.Detach(stream_id=1, grace_ms=600_000))
    for _ in range(50):
        world.turn()
    assert world.engine.scheduler.parked(world.sequence(1)) and world.sequence(1).row >= 0
    world.submit(frontend, 2, prompt_of(2, 200), 30)
    world.run()
    assert tokens_of(frontend, 2) == expected(prompt_of(2, 200), 30)
    # It lost its pages, and nothing else.
    attach = ex.Attach(stream_id=5, tenant="default", request_id="r1")
    world.send(frontend, attach=attach)
    world.run()
    assert tokens_of(frontend, 5) == expected(prompt_of(1, 200), 100)


def test_a_starving_output_takes_the_pages_of_a_parked_one_first(root: Path) -> None:
    world = World(root, pages=20, park_after=32)
    frontend, leaving = world.connect(), world.connect()
    world.submit(frontend, 1, prompt_of(1, 60), 230)
    world.submit(leaving, 2, prompt_of(2, 100), 100)
    world.submit(frontend, 3, prompt_of(3, 10), 300)
    while not tokens_of(leaving, 2):
        world.turn()
    world.send(leaving, detach=ex.Detach(stream_id=2, grace_ms=600_000))
    while not world.page_calls.preemptions:
        world.turn()
    # The last in order would have been 3.
    assert world.sequence(2).preempted and not world.sequence(3).preempted
    world.run()
    assert tokens_of(frontend, 1) == expected(prompt_of(1, 60), 230)


def test_a_parked_output_asks_for_no_pages(root: Path) -> None:
    world = World(root, park_after=1)
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 15), 300)
    while not tokens_of(frontend, 1):
        world.turn()
    world.disconnect(frontend)
    world.run()
    sequence = world.sequence(1)
    assert world.engine.scheduler.parked(sequence) and not sequence.asking
    sequence.capacity = sequence.known  # as if there had been no headroom
    world.away = True
    for _ in range(5):
        world.turn()
    assert not world.unanswered


def test_a_row_that_is_gone_is_replaced_by_another(root: Path) -> None:
    """No product path does this to a live executor; if it happens, no token may be lost or wrong."""
    world = World(root)
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 40), 100)
    while len(tokens_of(frontend, 1)) < 10:
        world.turn()
    sequence = world.sequence(1)
    core = world.manager.core
    assert core is not None
    while not sequence.asking:  # an ensure is answered within its turn here: catch one on its way
        world.away = True
        world.turn()
    core.close(sequence.request.key, 0, sequence.row_generation)
    world.answer()
    world.run()
    assert tokens_of(frontend, 1) == expected(prompt_of(1, 40), 100)


def test_usage_counts_what_the_prompt_found_cached_and_not_its_own_work(root: Path) -> None:
    world = World(root, pages=14)
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 40), 100)
    world.submit(frontend, 2, prompt_of(2, 40), 100)
    world.run(turns=20_000)
    assert world.page_calls.preemptions > 0
    for number in (1, 2):
        assert tokens_of(frontend, number) == expected(prompt_of(number, 40), 100)
        assert frontend.stream(number).ended[0].cached_tokens == 0


def test_cached_tokens_are_told_even_if_the_first_answer_is_lost(root: Path) -> None:
    world = World(root)
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 64), 5)
    world.run()
    world.lose_replies = True
    world.submit(frontend, 2, prompt_of(1, 64), 5)
    world.run()
    assert frontend.stream(2).ended[0].cached_tokens == 64


def test_steps_go_on_while_the_manager_is_away_and_rows_have_room(root: Path) -> None:
    world = World(root)
    frontend = world.connect()
    for number in (1, 2):
        world.submit(frontend, number, prompt_of(number, 20), 200)
    while len(tokens_of(frontend, 2)) < 3:
        world.turn()
    world.away = True
    before = len(tokens_of(frontend, 1))
    for _ in range(100):
        world.turn()
    went_on = len(tokens_of(frontend, 1)) - before
    assert PAGE_SIZE <= went_on <= 3 * PAGE_SIZE + 1
    # Each row is asked for once, however long it takes.
    assert {call.WhichOneof("call") for call in world.unanswered} == {"ensure_rows"}
    asked = [row for call in world.unanswered for row in call.ensure_rows.rows]
    assert sorted(asked) == sorted(world.sequence(number).row for number in (1, 2))
    world.answer()
    world.run()
    for number in (1, 2):
        assert tokens_of(frontend, number) == expected(prompt_of(number, 20), 200)


def test_answers_that_come_one_by_one(root: Path) -> None:
    world = World(root, pages=30)
    frontend = world.connect()
    for number in range(1, 8):
        world.submit(frontend, number, prompt_of(number, 50), 60)
    for _ in range(5000):
        world.away = True
        world.turn()
        world.answer(1)
        if all(frontend.stream(number).ended for number in range(1, 8)):
            break
    for number in range(1, 8):
        assert tokens_of(frontend, number) == expected(prompt_of(number, 50), 60)


def test_what_ends_gives_its_pages_back_before_others_ask(root: Path) -> None:
    world = World(root, max_num_seqs=4)
    frontend = world.connect()
    sent: list[list[str]] = []
    real = world._send

    def keep(calls: list[kv.Call]) -> None:
        sent.append([call.WhichOneof("call") or "" for call in calls])
        real(calls)

    world.engine._send = keep
    for number in range(1, 13):
        world.submit(frontend, number, prompt_of(number, 20), number)
    world.run()
    both = [kinds for kinds in sent if "close" in kinds and "ensure" in kinds]
    assert both and all(kinds.index("ensure") > kinds.index("close") for kinds in both)


def test_a_refusal_for_good_ends_the_request_honestly(root: Path) -> None:
    """The pool has turned out smaller than it was when the request was opened."""
    world = World(root, pages=40)
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 100), 400)
    while len(tokens_of(frontend, 1)) < 10:
        world.turn()
    assert world.manager.core is not None
    world.manager.core.pages.limit = world.manager.core.pages._most = 12  # a device has no extents to wait for
    world.manager.core.pages.free = [page for page in world.manager.core.pages.free if page < 12]
    world.run()
    assert frontend.stream(1).failures == [ex.FAILURE_TOO_LARGE]
    assert not world.manager.core.live_rows


def test_a_crowd_that_waits_for_one_prefix_is_looked_at_in_part(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are held for the first to fill the pages; without a bound a turn looks at everybody for everybody."""
    monkeypatch.setattr(admission, "_MOST_HELD", 20)
    looks: list[int] = []
    real = Scheduler.shares_unfilled_page

    def look(self: Scheduler, sequence: Sequence, filling: list[Sequence]) -> bool:
        looks.append(len(filling))
        return real(self, sequence, filling)

    monkeypatch.setattr(Scheduler, "shares_unfilled_page", look)
    world = World(root, pages=400, max_num_seqs=64, max_batch_tokens=16)
    frontend = world.connect()
    for number in range(1, 101):
        world.submit(frontend, number, prompt_of(1, 200), 2)
    while not world.engine.scheduler.running:
        world.turn()
    looks.clear()
    world.engine.step()
    assert looks == [1] * 20
    world.run()
    for number in range(1, 101):
        assert tokens_of(frontend, number) == expected(prompt_of(1, 200), 2)
    assert world.runner.computed_positions < 200 + 100 * (200 % PAGE_SIZE + 2)


def grow_calls(world: World) -> list[kv.EnsureRowsRequest]:
    """Every `ensure_rows` that is sent from now on, a list that grows."""
    found: list[kv.EnsureRowsRequest] = []
    real = world.engine._send

    def keep(calls: list[kv.Call]) -> None:
        asked = [call.ensure_rows for call in calls if call.HasField("ensure_rows")]
        assert len(asked) <= 1, "one call a turn, however many rows"
        found.extend(asked)
        real(calls)

    world.engine._send = keep
    return found


def test_rows_grow_in_one_call_a_turn_in_order(root: Path) -> None:
    world = World(root, pages=400)
    frontend = world.connect()
    for number in range(1, 9):
        world.submit(frontend, number, prompt_of(number, 20), 200, priority=number % 2)
    while len(world.engine.scheduler.running) < 8:
        world.turn()
    asked = grow_calls(world)
    world.run()
    assert max(len(call.rows) for call in asked) > 1
    for call in asked:
        # Generations count up in the order of admission: the higher priority first, then by arrival.
        assert list(call.row_generations) == sorted(set(call.row_generations))
    for number in range(1, 9):
        assert tokens_of(frontend, number) == expected(prompt_of(number, 20), 200)


def test_an_answer_about_a_row_that_was_given_up_meanwhile_is_dropped(root: Path) -> None:
    """The row number is another sequence's by then, or the same one's again: the generation tells them apart."""
    world = World(root)
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 20), 200)
    while not tokens_of(frontend, 1):
        world.turn()
    sequence = world.sequence(1)
    world.away = True
    while not sequence.asking:
        world.turn()
    stale = next(call for call in world.unanswered if call.HasField("ensure_rows"))
    row, generation = sequence.row, sequence.row_generation
    world.requests.call(world.page_calls.preempt(sequence))
    world.answer()
    while sequence.phase is not Phase.RUNNING:
        world.turn()
    assert sequence.row == row and sequence.row_generation > generation
    capacity = sequence.capacity
    reply = kv.Reply(ensure_rows=kv.EnsureRowsResponse(capacities=[1008]))
    world.page_calls.grown(stale.ensure_rows, reply)
    assert sequence.capacity == capacity
    world.run()
    assert tokens_of(frontend, 1) == expected(prompt_of(1, 20), 200)


def test_a_refused_growth_ends_the_requests_that_it_was_for(root: Path) -> None:
    world = World(root)
    frontend = world.connect()
    for number in (1, 2):
        world.submit(frontend, number, prompt_of(number, 20), 200)
    while not tokens_of(frontend, 2):
        world.turn()
    asked = grow_calls(world)
    world.away = True
    while not asked:
        world.turn()
    reply = kv.Reply(error=kv.Error(reason=kv.ERROR_REASON_INVALID, message="no"))
    for call in asked:
        world.page_calls.grown(call, reply)
    world.answer()
    world.run()
    assert frontend.stream(1).failures == frontend.stream(2).failures == [ex.FAILURE_NOT_FOUND]
    assert world.manager.core is not None and not world.manager.core.live_rows
