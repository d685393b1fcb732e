"""Many seeds, on all cores. What comes out depends on the seeds alone, not on how many work on them."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from enum import IntEnum

from tests.faults.simulator import operations
from tests.faults.simulator.faults import Violation
from tests.faults.simulator.messages import schedule as messages
from tests.faults.simulator.stores import schedule as stores

OPERATIONS_A_SEED = 2000
_SEEDS_A_TASK = {0: 2, 1: 50, 2: 20}

Trace = Callable[[str], None]


class Level(IntEnum):
    """What a seed is played on."""

    OPERATIONS = 0  # random calls of the manager's core, checked one by one
    STORES = 1  # manager's core and scripted executor, killed at every store
    MESSAGES = 2  # the product's processes over a network that fails


@dataclass(frozen=True, slots=True)
class Failure:
    """A seed that does not hold."""

    level: Level
    seed: int
    message: str

    def __str__(self) -> str:
        return f"{self.message}\nreplay: scripts/simulate --level {int(self.level)} --seed {self.seed} --trace"


@dataclass(slots=True)
class Report:
    """What was met over all seeds of a level."""

    level: Level
    seeds: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)

    def add(self, other: Report) -> None:
        self.seeds += other.seeds
        self.counts.update(other.counts)
        self.failures = sorted([*self.failures, *other.failures], key=lambda failure: failure.seed)

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in self.counts.items())
        return f"level {int(self.level)} ({self.level.name.lower()}): {self.seeds:,} seeds, {counts}"


def play(level: Level, seed: int, trace: Trace | None = None) -> Counter[str]:
    """One seed. Raises Violation."""
    match level:
        case Level.OPERATIONS:
            return Counter(asdict(operations.run(seed, OPERATIONS_A_SEED, trace)))
        case Level.STORES:
            return Counter(asdict(stores.run(stores.Schedule.drawn(seed), trace)))
        case Level.MESSAGES:
            return Counter(asdict(messages.run(messages.Schedule.drawn(seed), trace)))


def play_range(level: Level, seeds: range) -> Report:
    """One after the other, on this core."""
    report = Report(level)
    for seed in seeds:
        report.seeds += 1
        try:
            report.counts.update(play(level, seed))
        except Violation as violation:
            report.failures.append(Failure(level, seed, str(violation)))
    return report


def play_all(
    wanted: dict[Level, range], workers: int | None = None, done: Callable[[Report], None] = lambda part: None
) -> list[Report]:
    """On so many processes; all cores by default. done(part): told of each part that is through."""
    reports = {level: Report(level) for level in wanted}
    # Spawned: a fork would take along locks that other threads of this process hold.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=context) as pool:
        tasks = [
            pool.submit(play_range, level, part) for level, seeds in wanted.items() for part in _parts(level, seeds)
        ]
        for task in as_completed(tasks):
            part = task.result()
            reports[part.level].add(part)
            done(part)
    return list(reports.values())


def _parts(level: Level, seeds: range) -> Iterator[range]:
    size = _SEEDS_A_TASK[level]
    for start in range(seeds.start, seeds.stop, size):
        yield range(start, min(start + size, seeds.stop))
