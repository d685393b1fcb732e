"""A schedule: which requests come, what happens in which order, who dies where. A function of its seed alone."""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvmanager.layout import request_key
from tests.faults.simulator.executor import Executor
from tests.faults.simulator.faults import Countdown, ExecutorKilled
from tests.faults.simulator.model import VOCABULARY, Truth
from tests.faults.simulator.world import Violation, World

_MOST_TURNS = 5000


@dataclass(frozen=True, slots=True)
class Schedule:
    """`seed` draws the requests and the order of events; deaths are at numbered stores."""

    seed: int
    requests: int = 4
    pages: int = 12
    rows: int = 3
    manager_deaths: frozenset[int] = frozenset()
    executor_deaths: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Outcome:
    manager_stores: int
    executor_stores: int
    manager_deaths: int
    executor_deaths: int
    lost_answers: int
    hit_tokens: int


def run(schedule: Schedule) -> Outcome:
    """Plays it to the end. Raises Violation naming the schedule: running that again fails the same way."""
    try:
        return _play(schedule)
    except ExecutorKilled:
        raise
    except Exception as error:
        raise Violation(f"{schedule}: {type(error).__name__}: {error}") from error


def _requests(schedule: Schedule) -> list[Truth]:
    """Few tokens, prompts cut from two texts, two salts: many prefixes meet."""
    rng = random.Random(schedule.seed)
    texts = [[rng.randrange(VOCABULARY) for _ in range(14)] for _ in range(2)]
    return [
        Truth.of(
            request_key("tenant", f"request {number}"),
            rng.choice(("", "", "salt")),
            rng.choice(texts)[: rng.randint(1, 14)],
            rng.randint(1, 9),
        )
        for number in range(schedule.requests)
    ]


def _play(schedule: Schedule) -> Outcome:
    rng = random.Random(schedule.seed + 1)
    world = World(_requests(schedule), schedule.pages, schedule.rows, rng, schedule.manager_deaths)
    stores = Countdown(schedule.executor_deaths)
    lives = 1
    executor: Executor | None = None
    arriving = list(world.truths)
    hits = 0
    for _ in range(_MOST_TURNS):
        try:
            if executor is None:
                executor = Executor(world, lives, stores)
            if not _turn(world, executor, arriving, rng):
                break
        except ExecutorKilled:
            executor = None
            lives += 1
            world.check()
        hits = max(hits, world.core.hit_tokens)
    else:
        raise Violation("the schedule never ends")
    world.check_finished()
    return Outcome(world.stores.count, stores.count, world.manager_deaths, lives - 1, world.lost_answers, hits)


def _turn(world: World, executor: Executor, arriving: list[str], rng: random.Random) -> bool:
    """One event; False when all is done."""
    choice = rng.random()
    if arriving and choice < 0.15:
        world.open(arriving[0])
        executor.load(arriving.pop(0))
    elif choice < 0.25:
        world.call(lambda core: core.seal_all())
    elif choice < 0.32 and executor.with_row():
        executor.trim(rng.choice(executor.with_row()))
    elif choice < 0.36 and executor.with_row():
        executor.preempt(rng.choice(executor.with_row()))
    elif executor.unfinished:
        sequence = rng.choice(executor.unfinished)
        if not executor.advance(sequence, rng.randint(1, 6), rng.choice((0, 4, 8))):
            others = [other for other in executor.with_row() if other is not sequence]
            if not others:
                raise Violation("refused although nobody else holds a page")
            executor.preempt(rng.choice(others))
    return bool(arriving or executor.unfinished)
