"""An engine that plans a step while the one before it is under way says and stores what one that waits does.

The runner of these tests does everything as late as a device may, and fails when a page that it uses is taken away;
the frontend fails when a token comes before it is committed.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from kvmanager.keys import request_key
from kvmanager.renewal import renew
from pagehold.executor.v1 import executor_pb2 as ex
from pagehold.kv.v1 import kv_manager_pb2 as kv
from pagehold.runtime.progress import read_progress
from services.executor.inbox import Attached, PoolLost, Stop
from services.executor.sequence import Phase
from tests.unit.executor.checking_runner import expected
from tests.unit.executor.flying_runner import FlyingRunner
from tests.unit.executor.test_deaths import Scene
from tests.unit.executor.test_engine import prompt_of
from tests.unit.executor.world import Frontend, World


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "state"


def ahead(root: Path, **settings: int) -> World:
    return World(root, depth=1, **settings)


def runner_of(world: World) -> FlyingRunner:
    assert isinstance(world.runner, FlyingRunner)
    return world.runner


def tokens_of(frontend: Frontend, number: int) -> list[int]:
    return frontend.stream(number).tokens.get(0, [])


def check_empty(world: World) -> None:
    """Nothing is under way, and everything was given back."""
    assert not runner_of(world).flights
    core = world.manager.core
    assert core is not None and not core.live_rows and core.pages.available == core.pages.usable


# --- the same tokens ---


def test_a_step_is_submitted_before_the_one_before_it_is_collected(root: Path) -> None:
    world = ahead(root)
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 40), 50)
    world.run()
    assert tokens_of(frontend, 1) == expected(prompt_of(1, 40), 50)
    assert (frontend.stream(1).ended[0].reason, frontend.stream(1).ended[0].length) == (ex.END_REASON_LENGTH, 50)
    assert runner_of(world).most_flights == 2
    # An end by length is known beforehand: no position is computed in vain.
    assert world.runner.computed_positions == 40 + 49 == world.engine.prefill_tokens + world.engine.decode_tokens
    check_empty(world)


def play(root: Path, depth: int, pages: int) -> dict[tuple[int, int], tuple[list[int], int, int]]:
    """Prompts in chunks, prefix hits, stop tokens, outputs that fork, priorities; every output's tokens and end."""
    world = World(root, depth=depth, pages=pages, max_batch_tokens=48, max_num_seqs=10)
    frontend = world.connect()
    common = prompt_of(50, 40)
    for number in range(1, 7):
        world.submit(frontend, number, prompt_of(number, 20 + 17 * number), 60, priority=number % 2)
    for number in (7, 8, 9):
        world.submit(frontend, number, common + prompt_of(number, 13), 40)
    stop = expected(prompt_of(10, 30), 60)
    world.submit(frontend, 10, prompt_of(10, 30), 60, stopping={"stop_token_ids": [stop[17]]})
    world.submit(frontend, 11, prompt_of(11, 37), 30, n=4)
    for _ in range(60):
        world.turn()
    world.submit(frontend, 12, common, 20, priority=3)
    world.run(turns=20_000)
    assert runner_of(world).most_flights == 2 if depth else not world.engine._flight
    core = world.manager.core
    assert core is not None and not core.live_rows and core.pages.available == core.pages.usable
    return {
        (number, index): (stream.tokens[index], ended.reason, ended.length)
        for number, stream in frontend.heard.items()
        for index, ended in stream.ended.items()
    }


@pytest.mark.parametrize("pages", [22, 100])
def test_what_comes_out_does_not_depend_on_the_depth(tmp_path: Path, pages: int) -> None:
    waited = play(tmp_path / "waits", 0, pages)
    assert play(tmp_path / "ahead", 1, pages) == waited and len(waited) == 15


def test_preemption_changes_no_token(root: Path) -> None:
    world = ahead(root, pages=14)
    frontend = world.connect()
    for number in range(1, 9):
        world.submit(frontend, number, prompt_of(number, 30 + number), 70)
    world.run(turns=20_000)
    assert world.page_calls.preemptions > 0
    for number in range(1, 9):
        assert tokens_of(frontend, number) == expected(prompt_of(number, 30 + number), 70)
    check_empty(world)


def test_outputs_fork_what_is_committed(root: Path) -> None:
    world = ahead(root)
    frontend = world.connect()
    prompt = prompt_of(4, 167)
    world.submit(frontend, 1, prompt, 16, n=4)
    world.run()
    for index in range(4):
        assert frontend.stream(1).tokens[index] == expected(prompt, 16, index=index)
    assert world.runner.copied_slots == 3 * (167 % 16)
    assert world.runner.computed_positions <= 167 + 4 * 16
    check_empty(world)


@pytest.mark.parametrize("rest", [0, 20])  # 0: the page that is waited for ends the neighbour's prompt
def test_a_neighbour_waits_until_the_page_is_committed(root: Path, rest: int) -> None:
    world = ahead(root, max_batch_tokens=32)
    frontend = world.connect()
    common = prompt_of(6, 96)
    prompts = {1: common + prompt_of(7, rest), 2: common + prompt_of(8, 20)}
    for number, prompt in prompts.items():
        world.submit(frontend, number, prompt, 20)
    world.run()
    assert frontend.stream(2).ended[0].cached_tokens == 96
    for number, prompt in prompts.items():
        assert tokens_of(frontend, number) == expected(prompt, 20)


# --- ends and losses while a step is under way ---


def start(world: World, tokens: int = 400, heard: int = 12) -> Frontend:
    """One stream that has so many tokens, and a step under way."""
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 20), tokens)
    while len(tokens_of(frontend, 1)) < heard:
        world.turn()
    assert runner_of(world).flights and world.sequence(1).known == world.sequence(1).committed + 1
    return frontend


def test_a_stop_token_wastes_one_position(root: Path) -> None:
    world = ahead(root)
    frontend = world.connect()
    tokens = expected(prompt_of(5, 20), 60)
    world.submit(frontend, 1, prompt_of(5, 20), 60, stopping={"stop_token_ids": [tokens[9]]})
    world.run()
    assert tokens_of(frontend, 1) == tokens[:10]
    assert (frontend.stream(1).ended[0].reason, frontend.stream(1).ended[0].length) == (ex.END_REASON_STOP, 10)
    assert world.runner.computed_positions == 20 + 9 + 1
    assert world.engine.prefill_tokens + world.engine.decode_tokens == 20 + 9
    check_empty(world)


def test_cancel_keeps_what_is_committed(root: Path) -> None:
    world = ahead(root)
    frontend = start(world)
    world.send(frontend, cancel=ex.Cancel(tenant="default", request_id="r1"))
    world.run()
    heard = tokens_of(frontend, 1)
    assert heard == expected(prompt_of(1, 20), len(heard)) and len(heard) == frontend.stream(1).ended[0].length
    check_empty(world)


def test_stop_at_cannot_name_a_token_that_is_under_way(root: Path) -> None:
    world = ahead(root)
    frontend = start(world)
    length = world.sequence(1).length
    world.send(frontend, stop_at=ex.StopAt(tenant="default", request_id="r1", index=0, length=length + 1))
    world.turn()
    assert world.sequence(1).phase is Phase.RUNNING
    world.send(frontend, stop_at=ex.StopAt(tenant="default", request_id="r1", index=0, length=length))
    world.run()
    assert frontend.stream(1).ended[0].length == length
    check_empty(world)


def test_a_row_that_is_lost_goes_on_from_what_is_committed(root: Path) -> None:
    world = ahead(root)
    frontend = start(world, tokens=60)
    sequence = world.sequence(1)
    world.requests.call(world.page_calls.preempt(sequence))
    assert (sequence.computed, sequence.known) == (0, sequence.committed) and runner_of(world).flights
    committed = sequence.committed
    world.turn()
    assert sequence.committed == committed, "the result of a step in a row that is lost counts for nothing"
    world.run()
    assert tokens_of(frontend, 1) == expected(prompt_of(1, 20), 60)
    assert runner_of(world).released == 2


def test_what_takes_pages_waits_for_the_step_and_what_comes_before_it_does_not(root: Path) -> None:
    world = ahead(root)
    start(world)
    sent: list[tuple[str, int]] = []
    real = world.engine._send

    def send(calls: list[kv.Call]) -> None:
        sent.extend((str(call.WhichOneof("call")), world.runner.steps) for call in calls)
        real(calls)

    world.engine._send = send  # type: ignore[method-assign]
    steps = world.runner.steps
    growth = kv.Call(ensure_rows=kv.EnsureRowsRequest())
    world.requests.call(growth)
    world.requests.call(world.page_calls.preempt(world.sequence(1)))
    world.requests.call(growth)
    world.turn()
    names = ["ensure_rows", "close", "ensure_rows"]
    assert sent[:3] == list(zip(names, [steps, steps + 1, steps + 1], strict=True))


def test_growth_of_an_idle_device_is_not_delayed(root: Path) -> None:
    """Whatever is asked for with nothing under way goes out before the step."""
    world = ahead(root)
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 20), 5)
    world.run()
    world.requests.call(kv.Call(close=kv.CloseRequest(key=request_key("default", "r1"), row_generation=1)))
    assert not world.turn()
    assert world.inbox.take(0)


def test_the_last_step_is_committed_before_the_engine_stops(root: Path) -> None:
    world = ahead(root)
    frontend = start(world)
    world.inbox.put(Stop())
    world.engine.run()
    assert not runner_of(world).flights
    assert tokens_of(frontend, 1) == expected(prompt_of(1, 20), world.sequence(1).length)


def test_a_step_under_way_has_a_deadline_in_every_turn_that_waits_for_it(root: Path) -> None:
    world = ahead(root)
    start(world, tokens=14, heard=12)
    overdue_from: list[int] = []
    real = world.runner.collect

    def collect(ticket: object) -> object:
        view = read_progress(world.state.progress("executor"))
        assert view is not None
        overdue_from.append(view.deadline_ns)
        return real(ticket)

    world.runner.collect = collect  # type: ignore[method-assign,assignment]
    world.run()
    assert len(overdue_from) >= 2 and all(overdue_from)
    view = read_progress(world.state.progress("executor"))
    # Between two turns as well: the next one must begin.
    assert view is not None and view.deadline_ns


# --- deaths ---


@pytest.mark.parametrize("finishes", [False, True], ids=["the_step_is_lost", "the_device_finishes_it"])
def test_killed_between_submit_and_collect(root: Path, finishes: bool) -> None:
    world = ahead(root)
    start(world, tokens=60)
    committed = world.sequence(1).committed
    if finishes:
        runner_of(world).finish()
    world.start_executor()
    frontend = world.connect()
    world.send(frontend, attach=ex.Attach(stream_id=1, tenant="default", request_id="r1"))
    world.turn()
    assert world.sequence(1).committed == committed
    world.run()
    assert tokens_of(frontend, 1) == expected(prompt_of(1, 20), 60)
    assert world.engine.prefill_tokens == 0
    check_empty(world)


@pytest.mark.parametrize(
    "place", ["ensure.after", "run.before", "run.after", "commit.after", "finish.before", "copy.after"]
)
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_a_place_the_successor_goes_on(root: Path, place: str, seed: int) -> None:
    """The scene has all there is to lose."""
    rng = random.Random(f"{place} {seed}")
    scene = Scene(root, depth=1)
    most = {"run.before": 60, "run.after": 60, "commit.after": 150, "copy.after": 3}.get(place, 6)
    assert scene.play(f"executor.{place}=error@{rng.randint(1, most)}", restart_manager=bool(seed))
    scene.check()


def test_a_pool_that_is_lost_is_computed_again(root: Path) -> None:
    """The manager's death takes the memory along: the step under way is finished first, then nothing is left."""
    world = ahead(root)
    frontend = start(world, tokens=60)
    committed = world.sequence(1).committed
    core = world.manager.core
    assert core is not None
    renew(core.tables)
    core.rebuild()
    let_go: list[int] = []

    def lose() -> None:
        assert not runner_of(world).flights
        let_go.append(world.sequence(1).log.computed)
        world.runner.slots.clear()

    opened: list[bool] = []
    world.inbox.put(PoolLost(lose))
    world.inbox.put(Attached(kv.AttachResponse(), lambda: opened.append(True)))
    world.turn()
    assert let_go == [0] and opened == [True]
    assert world.sequence(1).phase is Phase.WAITING and world.sequence(1).committed == committed + 1
    world.run()
    assert tokens_of(frontend, 1) == expected(prompt_of(1, 20), 60)
    assert frontend.stream(1).recomputed == 1
    assert world.runner.computed_positions >= 20 + 59 + 20 + committed - 20
    check_empty(world)
