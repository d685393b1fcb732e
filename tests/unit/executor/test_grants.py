"""Slots that are copied on a grant: only what is still there, never below what is computed, never beyond the known."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmanager.keys import request_key
from kvmanager.layout import RowState, row_word
from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime import failpoint
from services.executor import grants
from services.executor.grants import Grant
from services.executor.sequence import Sequence
from tests.unit.executor.checking_runner import expected
from tests.unit.executor.test_engine import prompt_of
from tests.unit.executor.world import Frontend, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "state", pages=60)


def answer(world: World, frontend: Frontend, stream: int, prompt: list[int], tokens: int = 20) -> ex.Ended:
    world.submit(frontend, stream, prompt, tokens)
    world.run()
    assert frontend.stream(stream).tokens[0] == expected(prompt, tokens)
    return frontend.stream(stream).ended[0]


@pytest.mark.parametrize("common", [1, 7, 15])
def test_the_part_of_a_page_that_prompts_share_is_copied(world: World, common: int) -> None:
    frontend = world.connect()
    base = prompt_of(1, 32 + common)
    answer(world, frontend, 1, base + prompt_of(2, 30))
    before = world.runner.computed_positions
    other = base + prompt_of(3, 30)
    ended = answer(world, frontend, 2, other)
    assert ended.cached_tokens == 32 + common and world.runner.copied_slots == common
    assert world.runner.computed_positions - before == len(other) - ended.cached_tokens + 19


def test_a_death_between_the_copy_and_its_progress_word_loses_only_the_copy(world: World) -> None:
    frontend = world.connect()
    base = prompt_of(1, 45)
    answer(world, frontend, 1, base + prompt_of(2, 30))
    world.submit(frontend, 2, base + prompt_of(3, 30), 20)
    failpoint.arm("executor.copy.after=error")
    try:
        with pytest.raises(failpoint.FailpointError):
            world.run()
    finally:
        failpoint.arm("")
    world.start_executor()
    frontend = world.connect()
    world.send(frontend, attach=ex.Attach(stream_id=2, tenant="default", request_id="r2"))
    world.run()
    assert frontend.stream(2).tokens[0] == expected(base + prompt_of(3, 30), 20)
    assert world.runner.computed_positions == 75 - 32 + 19


def test_a_page_that_was_given_away_meanwhile_is_not_copied(world: World) -> None:
    """The answer waits in the inbox while the manager, asked by others, hands the page out again."""
    frontend = world.connect()
    base = prompt_of(1, 45)
    answer(world, frontend, 1, base + prompt_of(2, 30))
    world.away = True
    world.submit(frontend, 2, base + prompt_of(3, 30), 20)
    world.turn()
    world.answer(1)  # `open`
    world.away = True
    world.turn()
    assert [call.WhichOneof("call") for call in world.unanswered] == ["ensure"]
    world.answer()
    core = world.manager.core
    assert core is not None
    reply = world.inbox._events[-1].reply.ensure  # type: ignore[union-attr]
    assert reply.copy.tokens == 13
    record = kv.RequestRecord(tenant="x", request_id="x", prompt=range(860), digest=b"d", outputs=1, max_tokens=9)
    key = world.manager.call(kv.Call(open=kv.OpenRequest(record=record))).open.key
    row = core.ensure(key, 0, 864, 0, 0)
    taken = {int(entry) & 0xFFFFFFFF for entry in world.pool.tables.row_entry[row.row, :54]}
    assert reply.copy.page in taken, "this test needs the page to be given away"
    core.close(key, 0, row.generation)
    world.run()
    assert frontend.stream(2).tokens[0] == expected(base + prompt_of(3, 30), 20)
    assert not world.runner.copied_slots
    assert frontend.stream(2).ended[0].cached_tokens == 32


class Settled:
    """A running sequence of 37 tokens, prompt and nothing else, whose row is granted to it again by hand."""

    def __init__(self, world: World) -> None:
        self.world = world
        frontend = world.connect()
        world.submit(frontend, 1, prompt_of(1, 37), 20)
        world.submit(frontend, 2, prompt_of(2, 37), 20)
        while len(world.engine.scheduler.running) < 2:
            world.turn()
        self.sequence, self.other = (self._sequence(number) for number in (1, 2))
        page = world.pool.page_at(self.other, 0)
        self.copy = kv.PageCopy(page=page, page_generation=int(world.pool.tables.page_word[page]) >> 32, tokens=9)

    def _sequence(self, number: int) -> Sequence:
        sequence = self.world.requests.sequence(request_key("default", f"r{number}"), 0)
        assert sequence is not None
        return sequence

    def settle(self, shared: int, computed: int, capacity: int = 48) -> int:
        """`computed`: what the log says of the row. Returns how many slots were copied so far."""
        sequence = self.sequence
        sequence.known = sequence.committed = 37
        sequence.log.set_progress(computed, 37)
        grant = Grant(sequence.row, sequence.row_generation, capacity, shared, self.copy)
        grants.settle(sequence, grant, self.world.pool, self.world.runner)
        return self.world.runner.copied_slots


def test_a_copy_ends_at_what_is_known(world: World) -> None:
    settled = Settled(world)
    assert settled.settle(shared=32, computed=32) == 5
    assert settled.sequence.computed == settled.sequence.log.computed == 37


def test_nothing_below_what_is_computed_is_touched(world: World) -> None:
    assert Settled(world).settle(shared=32, computed=33) == 0


def test_a_copy_needs_a_page_to_go_to(world: World) -> None:
    assert Settled(world).settle(shared=32, computed=32, capacity=32) == 0


def test_a_copy_of_another_generation_is_not_made(world: World) -> None:
    settled = Settled(world)
    settled.copy.page_generation += 1
    assert settled.settle(shared=32, computed=32) == 0
    settled.copy.page_generation -= 1
    assert settled.settle(shared=32, computed=32) == 5


def test_pages_of_pinned_rows_are_not_free(world: World) -> None:
    frontend = world.connect()
    answer(world, frontend, 1, prompt_of(1, 64))
    assert world.pool.free_pages() == 60
    core = world.manager.core
    assert core is not None
    world.submit(frontend, 2, prompt_of(1, 64), 5, pin_prefix="system")
    world.run()
    states = core.tables.row_word.tolist()
    assert row_word(RowState.PINNED, 0, 0) & 0xFF in {word & 0xFF for word in states}
    assert world.pool.free_pages() == 60 - 4
    # A row that is no sequence's is nobody's to adopt.
    world.start_executor()
    world.run()
    assert not world.engine.scheduler.running and world.pool.free_pages() == 60 - 4
