"""Who gives up its row, as a pure choice, and what becomes of it between executor and manager."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.executor.preemption import choose_victim
from services.executor.sequence import Phase, Sequence
from tests.unit.executor.checking_runner import expected
from tests.unit.executor.test_engine import prompt_of
from tests.unit.executor.test_scheduler import make
from tests.unit.executor.world import Frontend, World

PAGE_SIZE = 16


def resumed(arrival: int, tokens: int, priority: int = 0) -> Sequence:
    """One that has its row back and has committed `tokens` since."""
    sequence = make(arrival, computed=30, known=31, priority=priority)
    sequence.resumed_at = 31 - tokens
    return sequence


def choose(*running: Sequence, parked: tuple[Sequence, ...] = (), below: int | None = None) -> Sequence | None:
    return choose_victim(sorted(running, key=lambda one: one.priority_key), parked, PAGE_SIZE, below)


# --- the choice ---


def test_nobody_runs() -> None:
    assert choose() is None and choose(below=5) is None


def test_the_latest_arrival_goes_first() -> None:
    first, last = make(1), make(9)
    assert choose(last, first) is last


def test_the_lowest_priority_goes_before_the_latest_arrival() -> None:
    low, high = make(1, priority=-1), make(9, priority=2)
    assert choose(low, make(5), high) is low


def test_a_parked_one_goes_before_all_others() -> None:
    parked, low = make(1, priority=7, read=False), make(9, priority=-7)
    assert choose(parked, low, parked=(parked,)) is parked
    assert choose(parked, low, parked=(parked,), below=-9) is parked


def test_who_has_its_row_back_is_spared_for_a_page_of_tokens() -> None:
    old, back = make(1), resumed(9, tokens=PAGE_SIZE - 1)
    assert choose(old, back) is old
    back.resumed_at = back.committed - PAGE_SIZE
    assert choose(old, back) is back


def test_if_all_are_spared_the_latest_arrival_goes() -> None:
    first, last = resumed(1, tokens=3), resumed(2, tokens=1)
    assert choose(first, last) is last


def test_who_has_not_committed_a_token_since_is_never_chosen() -> None:
    back, other = resumed(9, tokens=0), resumed(1, tokens=1)
    assert choose(other, back) is other
    assert choose(back) is None


def test_a_higher_priority_is_not_taken_to_spare_a_lower_one() -> None:
    """The lower one commits a token soon, and then it is its turn."""
    high, low = make(1, priority=3), resumed(2, tokens=0)
    assert choose(high, low) is None
    assert low.resumed_at is not None
    low.resumed_at -= 1
    assert choose(high, low) is low


@pytest.mark.parametrize(("below", "taken"), [(-1, False), (0, False), (1, True)])
def test_a_waiting_one_takes_from_strictly_lower_priorities_alone(below: int, taken: bool) -> None:
    running = make(1, priority=0)
    assert (choose(running, below=below) is running) == taken


def test_nobody_is_taken_whose_pages_a_sibling_is_about_to_share() -> None:
    first, source = make(1), make(2)
    child = make(2, running=False)
    child.request = source.request
    source.request.sequences.append(child)
    child.forking = source
    assert choose(first, source) is first
    assert choose(source) is None and choose(source, parked=(source,)) is None
    child.forking = None
    assert choose(first, source) is source


# --- with a manager ---


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "state"


def tokens_of(frontend: Frontend, number: int) -> list[int]:
    return frontend.stream(number).tokens.get(0, [])


def test_a_higher_priority_takes_pages_of_the_lowest_when_the_pool_is_full(root: Path) -> None:
    world = World(root, pages=24)
    frontend = world.connect()
    for number, priority in ((1, 0), (2, -2), (3, -1)):
        world.submit(frontend, number, prompt_of(number, 90), 100, priority=priority)
    while len(tokens_of(frontend, 3)) < 8:
        world.turn()
    world.submit(frontend, 4, prompt_of(4, 90), 100, priority=5)
    while not tokens_of(frontend, 4):
        world.turn()
    assert not any(frontend.stream(number).ended for number in (1, 2, 3))
    assert world.sequence(2).preempted and not world.sequence(1).preempted
    world.run(turns=5000)
    for number in (1, 2, 3, 4):
        assert tokens_of(frontend, number) == expected(prompt_of(number, 90), 100)


def test_headroom_goes_before_a_row_does(root: Path) -> None:
    world = World(root, pages=24)
    frontend = world.connect()
    for number in (1, 2):
        world.submit(frontend, number, prompt_of(number, 140), 60)
    while not tokens_of(frontend, 2):
        world.turn()
    assert all(world.sequence(number).capacity >= 176 for number in (1, 2))
    # Two pages are left, two of each row are not written: four are enough with one to be kept for each.
    world.submit(frontend, 3, prompt_of(3, 30), 2, priority=1)
    while not tokens_of(frontend, 3):
        world.turn()
    assert not world.page_calls.preemptions


def test_equal_priorities_wait_for_each_other(root: Path) -> None:
    world = World(root, pages=24)
    frontend = world.connect()
    world.submit(frontend, 1, prompt_of(1, 200), 60, priority=3)
    while not tokens_of(frontend, 1):
        world.turn()
    world.submit(frontend, 2, prompt_of(2, 200), 60, priority=3)
    world.run()
    assert not world.page_calls.preemptions
    for number in (1, 2):
        assert tokens_of(frontend, number) == expected(prompt_of(number, 200), 60)


def test_a_higher_priority_takes_a_lane_when_all_are_taken(root: Path) -> None:
    world = World(root, max_num_seqs=4)
    frontend = world.connect()
    for number in range(1, 5):
        world.submit(frontend, number, prompt_of(number, 20), 200, priority=number % 2)
    while len(world.engine.scheduler.running) < 4:
        world.turn()
    for number in (5, 6, 7):
        world.submit(frontend, number, prompt_of(number, 20), 200, priority=1)
    for _ in range(20):
        world.turn()
    # Two of the lower priority gave way; the third has nobody below it.
    assert [world.sequence(number).phase for number in (2, 4)] == [Phase.WAITING] * 2
    assert [world.sequence(number).phase for number in (5, 6, 7)] == [Phase.RUNNING] * 2 + [Phase.WAITING]
    assert len(world.engine.scheduler.running) == 4 and world.page_calls.preemptions == 2
    world.run(turns=5000)
    for number in range(1, 8):
        assert tokens_of(frontend, number) == expected(prompt_of(number, 20), 200)
    assert world.runner.largest_batch == 4


def test_who_lost_its_row_is_not_overtaken_by_newcomers(root: Path) -> None:
    world = World(root, pages=24, max_num_seqs=3)
    frontend = world.connect()
    for number in (1, 2):
        world.submit(frontend, number, prompt_of(number, 120), 200)
    while not world.page_calls.preemptions:
        world.turn()
    for number in range(3, 9):
        world.submit(frontend, number, prompt_of(number, 20), 5)
    while world.sequence(2).phase is Phase.WAITING:
        world.turn()
        assert not any(tokens_of(frontend, number) for number in range(3, 9))
    world.run(turns=5000)
    for number in range(3, 9):
        assert tokens_of(frontend, number) == expected(prompt_of(number, 20), 5)


def test_every_row_that_is_given_back_yields_a_token(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool far too small, and a stream of high priorities: the low ones still get on, a token at least each time."""
    world = World(root, pages=16, max_batch_tokens=16, max_num_seqs=6)
    frontend = world.connect()
    lost_at: dict[Sequence, int] = {}
    real = world.page_calls.preempt

    def watch(sequence: Sequence) -> object:
        assert sequence.known > lost_at.get(sequence, 0), "it lost its row twice, and committed nothing in between"
        lost_at[sequence] = sequence.known
        return real(sequence)

    monkeypatch.setattr(world.page_calls, "preempt", watch)
    world.page_calls._admission._preempt = watch  # type: ignore[assignment]
    for number in range(1, 6):
        world.submit(frontend, number, prompt_of(number, 60), 80)
    for number in range(6, 30):
        world.submit(frontend, number, prompt_of(number, 40), 30, priority=number % 3)
        for _ in range(12):
            world.turn()
    world.run(turns=20_000)
    for number in range(1, 6):
        assert tokens_of(frontend, number) == expected(prompt_of(number, 60), 80)
    assert world.page_calls.preemptions >= 5
