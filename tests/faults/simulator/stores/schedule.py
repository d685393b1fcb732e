"""A schedule: which requests come, what happens in which order, who dies where. A function of its seed alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from kvmanager.pins import Pin
from tests.faults.simulator.faults import Countdown, ExecutorKilled, Violation
from tests.faults.simulator.stores.checks import Checks
from tests.faults.simulator.stores.executor import Executor
from tests.faults.simulator.stores.requests import plan_requests
from tests.faults.simulator.stores.running import Running
from tests.faults.simulator.stores.world import World

Trace = Callable[[str], None]

_MOST_TURNS = 5000
_PLANNED_STORES = 110  # of about 100 in a schedule
_CHECKED_TURNS = 16  # everything is checked once in so many


@dataclass(frozen=True, slots=True)
class Schedule:
    """`seed` draws the requests and the order of events; deaths are at numbered stores."""

    seed: int
    requests: int = 4
    pages: int = 12
    rows: int = 3
    prefix_cache: bool = True
    manager_deaths: frozenset[int] = frozenset()
    executor_deaths: frozenset[int] = frozenset()

    @classmethod
    def drawn(cls, seed: int) -> Schedule:
        """With deaths of both, at random stores."""
        rng = random.Random(f"stores {seed}")

        def deaths(most: int) -> frozenset[int]:
            return frozenset(rng.randrange(_PLANNED_STORES) for _ in range(rng.randint(1, most)))

        requests, pages, rows, cache = rng.randint(2, 4), rng.randint(8, 18), rng.randint(2, 5), rng.random() < 0.85
        return cls(seed, requests, pages, rows, cache, deaths(8), deaths(4))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was met on the way; replayed, it is the same."""

    manager_stores: int
    executor_stores: int
    manager_deaths: int
    executor_deaths: int
    broken_streams: int
    hit_tokens: int
    copied_tokens: int
    forks: int
    pins: int
    preemptions: int
    cancels: int
    refused: int


class _Event(Enum):
    ARRIVE = auto()
    SEAL = auto()
    TRIM = auto()
    PREEMPT = auto()
    CANCEL = auto()
    FORGET = auto()
    UNPIN = auto()
    REPEAT = auto()
    ASK = auto()
    RECEIVE = auto()
    RUN = auto()


_EVENTS = tuple(_Event)


def run(schedule: Schedule, trace: Trace | None = None) -> Outcome:
    """Plays it to the end. Raises Violation naming the schedule: running that again fails the same way."""
    try:
        return _Play(schedule, trace).play()
    except Exception as error:
        raise Violation(f"{schedule}: {type(error).__name__}: {error}") from error


class _Play:
    def __init__(self, schedule: Schedule, trace: Trace | None) -> None:
        self._trace = trace
        self._rng = random.Random(schedule.seed)
        requests = plan_requests(self._rng, schedule.requests)
        deaths, cache = schedule.manager_deaths, schedule.prefix_cache
        self._world = World(requests, schedule.pages, schedule.rows, self._rng, deaths, cache)
        self._checks = Checks(self._world)
        self._world.on_death = self._manager_died
        self._stores = Countdown(schedule.executor_deaths)
        self._executor: Executor | None = None
        self._lives = 0
        self._arriving = list(self._world.requests)
        self._counts: Counter[str] = Counter()
        self._hits = 0

    def _manager_died(self) -> None:
        self._say(f"manager died before store {self._world.stores.count - 1}; another adopts")
        self._checks.check()

    def _say(self, line: str) -> None:
        if self._trace is not None:
            self._trace(line)

    def play(self) -> Outcome:
        for turn in range(_MOST_TURNS):
            try:
                if self._executor is None:
                    self._lives += 1
                    self._executor = Executor(self._world, self._checks, self._lives, self._stores)
                if not self._turn(self._executor):
                    break
            except ExecutorKilled:
                self._say(f"executor died before store {self._stores.count - 1}")
                self._leave(self._executor)
                self._executor = None
                self._checks.check()
            if turn % _CHECKED_TURNS == 0:
                self._checks.check()
            self._hits = max(self._hits, self._world.core.hit_tokens)
        else:
            raise Violation("the schedule never ends")
        self._leave(self._executor)
        self._checks.check_finished()
        return self._outcome()

    def _leave(self, executor: Executor | None) -> None:
        if executor is not None:
            self._counts["copied"] += executor.copied_tokens
            self._counts["forks"] += executor.forks

    def _outcome(self) -> Outcome:
        world = self._world
        return Outcome(
            manager_stores=world.stores.count,
            executor_stores=self._stores.count,
            manager_deaths=world.manager_deaths,
            executor_deaths=self._lives - 1,
            broken_streams=world.broken_streams,
            hit_tokens=self._hits,
            copied_tokens=self._counts["copied"],
            forks=self._counts["forks"],
            pins=len(world.core.rows.pinned),
            preemptions=self._counts["preemptions"],
            cancels=self._counts["cancels"],
            refused=len(world.refused),
        )

    def _turn(self, executor: Executor) -> bool:
        """One event; False when all is done."""
        event = self._rng.choices(_EVENTS, self._weights(executor))[0]
        if self._trace is not None:
            rows = " ".join(f"{sequence.key[:4]}/{sequence.index}" for sequence in executor.with_row)
            self._trace(f"{event.name.lower()}: {len(executor.unfinished)} unfinished, rows of {rows}")
        self._happen(event, executor)
        if not executor.waits and any(sequence.short for sequence in executor.unfinished):
            self._make_room(executor)
        return bool(self._arriving or executor.unfinished or executor.waits)

    def _weights(self, executor: Executor) -> list[int]:
        """How likely each event is, in the order of `_EVENTS`; 0: impossible now."""
        have_row = executor.with_row
        return [
            20 if self._arriving else 0,
            8 if have_row else 0,
            4 if have_row else 0,
            3 if have_row else 0,
            1 if executor.unfinished else 0,
            4 if len(executor.unfinished) < len(executor.sequences) else 0,
            1 if self._world.core.rows.pinned else 0,
            2 if executor.closed else 0,
            30 if any(sequence.wants for sequence in executor.unfinished) else 0,
            40 if executor.waits else 0,
            40 if any(sequence.can_run for sequence in have_row) else 0,
        ]

    def _happen(self, event: _Event, executor: Executor) -> None:
        rng, world = self._rng, self._world
        match event:
            case _Event.ARRIVE:
                for key in self._arriving[: rng.randint(1, 3)]:
                    if world.open(key):
                        executor.load(key)
                    self._arriving.remove(key)
            case _Event.SEAL:
                world.call(lambda core: core.seal_all())
            case _Event.TRIM:
                executor.trim(rng.choice(executor.with_row))
            case _Event.PREEMPT:
                self._preempt(executor, rng.choice(executor.with_row))
            case _Event.CANCEL:
                self._counts["cancels"] += 1
                executor.cancel(rng.choice(executor.unfinished).key)
            case _Event.FORGET:
                for key in executor.forgettable():
                    executor.forget(key)
            case _Event.UNPIN:
                self._unpin(rng.choice(world.core.pins.list()).pin)
            case _Event.REPEAT:
                executor.repeat_old()
            case _Event.ASK:
                executor.ask(rng.choice((0, 4, 8)), rng.choice((0, 0, 1)))
            case _Event.RECEIVE:
                executor.receive(rng.randint(1, 6))
            case _Event.RUN:
                for sequence in executor.with_row:
                    if sequence.can_run and rng.random() < 0.8:
                        executor.run(sequence, rng.randint(1, 6))

    def _preempt(self, executor: Executor, sequence: Running) -> None:
        self._counts["preemptions"] += 1
        executor.preempt(sequence)

    def _unpin(self, pin: Pin) -> None:
        self._checks.unpinned(pin)
        self._world.call(lambda core: core.unpin(pin))
        self._checks.unpinned(pin)  # again: a manager that died in it was looked at

    def _make_room(self, executor: Executor) -> None:
        """Every answer is in: headroom goes back first, then one sequence loses its row."""
        idle = [sequence for sequence in executor.with_row if sequence.has_headroom]
        for sequence in idle:
            executor.trim(sequence)
        if not idle and executor.with_row:
            self._preempt(executor, self._rng.choice(executor.with_row))
        for sequence in executor.unfinished:
            sequence.short = False
