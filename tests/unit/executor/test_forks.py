"""Outputs of one request: the prompt is computed once, its pages are shared, its last page is copied."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmanager.keys import request_key
from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime import failpoint
from services.executor.forks import ENSURE, WAIT, origin_of, way_of
from services.executor.sequence import Phase, Sequence
from tests.unit.executor.checking_runner import expected
from tests.unit.executor.test_engine import prompt_of
from tests.unit.executor.test_scheduler import make
from tests.unit.executor.world import Frontend, World


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "state"


def outputs(*phases: tuple[Phase, int]) -> list[Sequence]:
    """The outputs of one request with a prompt of 20 tokens: phase and `computed` of each."""
    found: list[Sequence] = []
    for index, (phase, computed) in enumerate(phases):
        sequence = make(1, prompt=20, computed=computed, known=max(20, computed))
        sequence.phase, sequence.index = phase, index
        sequence.request = found[0].request if found else sequence.request
        found.append(sequence)
    found[0].request.sequences[:] = found
    return found


def ways(sequences: list[Sequence], *parked: int) -> list[object]:
    """For each that waits: the index to fork from, or what else it does; None for all others."""

    def is_parked(sequence: Sequence) -> bool:
        return sequence.index in parked

    origin = origin_of(sequences[0].request, is_parked)
    found: list[object] = []
    for sequence in sequences:
        way = way_of(sequence, origin) if sequence.phase is Phase.WAITING and not is_parked(sequence) else None
        found.append(way.source.index if way is not None and way.source is not None else way)
    return found


W, R, E = Phase.WAITING, Phase.RUNNING, Phase.ENDED


def test_the_first_asks_and_the_others_wait_for_it() -> None:
    assert ways(outputs((W, 0), (W, 0), (W, 0))) == [ENSURE, WAIT, WAIT]
    assert ways(outputs((R, 19), (W, 0), (W, 0))) == [None, WAIT, WAIT]


def test_they_fork_from_whoever_has_the_prompt() -> None:
    assert ways(outputs((R, 20), (W, 0), (W, 0))) == [None, 0, 0]
    assert ways(outputs((W, 0), (R, 35), (W, 0))) == [1, None, 1]


def test_nobody_waits_for_one_that_cannot_go_on() -> None:
    assert ways(outputs((E, 40), (W, 0), (W, 0))) == [None, ENSURE, WAIT]
    assert ways(outputs((W, 0), (W, 0), (W, 0)), 0) == [None, ENSURE, WAIT]
    assert ways(outputs((R, 3), (W, 0)), 0) == [None, ENSURE]
    # One that rests still has the prompt in its row.
    assert ways(outputs((R, 20), (W, 0)), 0) == [None, 0]


def test_nobody_waits_for_one_that_comes_after_it() -> None:
    assert ways(outputs((W, 0), (R, 3), (W, 0))) == [ENSURE, None, WAIT]


# --- with a manager ---


def asked(world: World) -> list[kv.Call]:
    """Every call that is sent from now on."""
    found: list[kv.Call] = []
    real = world.engine._send

    def keep(calls: list[kv.Call]) -> None:
        found.extend(calls)
        real(calls)

    world.engine._send = keep
    return found


def kinds(calls: list[kv.Call], *names: str) -> list[str]:
    return [kind for call in calls if (kind := call.WhichOneof("call")) in names]


def check(frontend: Frontend, stream: int, prompt: list[int], tokens: int, outputs: int) -> None:
    for index in range(outputs):
        assert frontend.stream(stream).tokens[index] == expected(prompt, tokens, index=index), f"output {index}"


def sequences_of(world: World, number: int = 1) -> list[Sequence]:
    return world.requests.live[request_key("default", f"r{number}")].sequences


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("length", [5, 16, 160, 165])
def test_the_prompt_is_computed_once(root: Path, length: int, prefix_cache: bool) -> None:
    world = World(root)
    world.prefix_cache = prefix_cache
    world.start_executor()
    calls, frontend = asked(world), world.connect()
    prompt = prompt_of(4, length)
    world.submit(frontend, 1, prompt, 16, n=4)
    world.run()
    check(frontend, 1, prompt, 16, 4)
    assert kinds(calls, "ensure", "fork") == ["ensure", "fork", "fork", "fork"]
    # Each fork runs the prompt's last position again, for its own sample.
    assert world.runner.computed_positions == length + 15 + 3 * 16
    assert world.runner.copied_slots == 3 * (length % 16)
    # Nothing was found cached, whoever shared whose pages.
    assert [frontend.stream(1).ended[index].cached_tokens for index in range(4)] == [0] * 4


def test_forks_tell_what_their_sibling_has_found(root: Path) -> None:
    world = World(root)
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 40), 5)
    world.run()
    world.submit(frontend, 2, prompt_of(1, 40) + prompt_of(2, 30), 5, n=3)
    world.run()
    assert [frontend.stream(2).ended[index].cached_tokens for index in range(3)] == [32 + 8 - 8] * 3


def test_pages_of_the_prompt_are_in_all_rows_at_once(root: Path) -> None:
    world = World(root)
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(4, 165), 40, n=4)
    while len(world.engine.scheduler.running) < 4:
        world.turn()
    entries = [world.pool.tables.row_entry[sequence.row, :11].tolist() for sequence in sequences_of(world)]
    assert all(row[:10] == entries[0][:10] for row in entries)
    assert len({row[10] for row in entries}) == 4
    assert world.pool.free_pages() == 200 - len(
        {entry for row in world.pool.tables.row_entry.tolist() for entry in row if entry}
    )


def test_without_forks_each_output_asks_for_itself(root: Path) -> None:
    world = World(root)
    world.fork = False
    world.start_executor()
    calls, frontend = asked(world), world.connect()
    prompt = prompt_of(4, 165)
    world.submit(frontend, 1, prompt, 16, n=4)
    world.run()
    check(frontend, 1, prompt, 16, 4)
    assert kinds(calls, "ensure", "fork") == ["ensure"] * 4


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_one_that_has_lost_its_row_asks_for_more_than_the_prompt_where_prefixes_are_cached(
    root: Path, prefix_cache: bool
) -> None:
    world = World(root)
    world.prefix_cache = prefix_cache
    world.start_executor()
    frontend = world.connect()
    prompt = prompt_of(4, 40)
    world.submit(frontend, 1, prompt, 100, n=2)
    while len(frontend.stream(1).tokens.get(1, [])) < 50:
        world.turn()
    calls = asked(world)
    world.requests.call(world.page_calls.preempt(sequences_of(world)[1]))
    world.run()
    check(frontend, 1, prompt, 100, 2)
    assert kinds(calls, "ensure", "fork") == (["ensure"] if prefix_cache else ["fork"])


def test_answers_that_are_lost_are_asked_for_again(root: Path) -> None:
    world = World(root)
    world.lose_replies = True
    frontend = world.connect()
    prompt = prompt_of(4, 37)
    world.submit(frontend, 1, prompt, 30, n=5)
    world.run()
    check(frontend, 1, prompt, 30, 5)
    assert world.runner.copied_slots == 4 * 5


def test_a_fork_of_a_row_that_is_gone_asks_ensure(root: Path) -> None:
    """No product path takes a row from a live executor; if one were gone, the fork must not wait for ever."""
    world = World(root)
    frontend = world.connect()
    prompt = prompt_of(4, 37)
    world.submit(frontend, 1, prompt, 30, n=2)
    while not frontend.stream(1).tokens.get(0):
        world.turn()
        world.away = bool(frontend.stream(1).tokens.get(0))
    while not kinds(world.unanswered, "fork"):
        world.turn()
    for call in world.unanswered:
        if call.HasField("fork"):
            call.fork.from_row_generation += 1
    calls = asked(world)
    world.answer()
    world.run()
    check(frontend, 1, prompt, 30, 2)
    assert kinds(calls, "ensure", "fork") == ["ensure"]


def test_the_row_that_a_fork_relies_on_is_not_taken_away_meanwhile(root: Path) -> None:
    """The manager is slow, and a reader comes back to one of higher priority, which wants a lane at once."""
    world = World(root, max_num_seqs=2, park_after=32)
    frontend, leaving = world.connect(), world.connect()
    world.submit(leaving, 9, prompt_of(9, 20), 80, priority=1)
    while len(leaving.stream(9).tokens.get(0, [])) < 40:
        world.turn()
    world.send(leaving, detach=ex.Detach(stream_id=9, grace_ms=600_000))
    for _ in range(50):
        world.turn()
    world.requests.call(world.page_calls.preempt(sequences_of(world, 9)[0]))
    prompt = prompt_of(4, 37)
    world.submit(frontend, 1, prompt, 60, n=2)
    while not frontend.stream(1).tokens.get(0):
        world.turn()
        world.away = bool(frontend.stream(1).tokens.get(0))
    while not kinds(world.unanswered, "fork"):
        world.turn()
    world.send(frontend, attach=ex.Attach(stream_id=8, tenant="default", request_id="r9"))
    for _ in range(5):
        world.turn()
    first, second = sequences_of(world)
    assert first.is_being_forked and not first.preempted
    world.answer()
    while not second.preempted:
        world.turn()
    assert not first.is_being_forked and not first.preempted
    world.run()
    check(frontend, 1, prompt, 60, 2)
    assert frontend.stream(8).tokens[0] == expected(prompt_of(9, 20), 80)


def test_when_the_first_is_cancelled_before_it_has_the_prompt_the_next_computes_it(root: Path) -> None:
    world = World(root)
    frontend = world.connect()
    prompt = prompt_of(4, 200)
    world.submit(frontend, 1, prompt, 20, n=3)
    while not any(sequence.computed for sequence in world.engine.scheduler.running):
        world.turn()
    world.send(frontend, stop_at=ex.StopAt(tenant="default", request_id="r1", index=0, length=0))
    world.run()
    assert frontend.stream(1).ended[0].length == 0
    for index in (1, 2):
        assert frontend.stream(1).tokens[index] == expected(prompt, 20, index=index)


def test_more_outputs_than_lanes(root: Path) -> None:
    world = World(root, max_num_seqs=3)
    frontend = world.connect()
    prompt = prompt_of(4, 37)
    world.submit(frontend, 1, prompt, 20, n=10)
    world.run()
    check(frontend, 1, prompt, 20, 10)


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("pages", [9, 14, 22])
def test_a_pool_that_holds_only_some_of_the_outputs(root: Path, pages: int, prefix_cache: bool) -> None:
    world = World(root, pages=pages)
    world.prefix_cache = prefix_cache
    world.start_executor()
    frontend = world.connect()
    prompt = prompt_of(4, 37)
    world.submit(frontend, 1, prompt, 90, n=5)
    world.submit(frontend, 2, prompt_of(5, 20), 40, n=2)
    world.run(turns=20_000)
    check(frontend, 1, prompt, 90, 5)
    check(frontend, 2, prompt_of(5, 20), 40, 2)


@pytest.mark.parametrize("point", ["executor.copy.before", "executor.copy.after"])
@pytest.mark.parametrize("hit", [1, 2, 3])
@pytest.mark.parametrize("restart_manager", [False, True])
def test_a_death_at_the_copy(root: Path, point: str, hit: int, restart_manager: bool) -> None:
    """It costs each fork at most the slots that were to be copied: they are computed."""
    world = World(root)
    frontend = world.connect()
    prompt = prompt_of(4, 165)
    world.submit(frontend, 1, prompt, 20, n=4)
    failpoint.arm(f"{point}=error@{hit}")
    try:
        with pytest.raises(failpoint.FailpointError):
            world.run()
    finally:
        failpoint.arm("")
    if restart_manager:
        world.manager = world._new_manager()
    before = world.runner.computed_positions
    world.start_executor()
    frontend = world.connect()
    world.send(frontend, attach=ex.Attach(stream_id=1, tenant="default", request_id="r1"))
    world.run()
    check(frontend, 1, prompt, 20, 4)
    assert before <= 165 + 4 * 20
    assert world.runner.computed_positions <= 3 * 5 + 4 * 20
