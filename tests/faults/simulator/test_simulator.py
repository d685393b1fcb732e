"""Every store of short lives is a place to die; long lives die at random places."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.faults.simulator.schedule import Outcome, Schedule, run

SHORT = (Schedule(3, requests=3), Schedule(8, requests=3), Schedule(21, requests=5, pages=8))


@pytest.mark.parametrize("schedule", SHORT, ids=lambda schedule: f"seed{schedule.seed}")
def test_manager_killed_before_every_store(schedule: Schedule) -> None:
    undisturbed = run(schedule)
    assert undisturbed.manager_deaths == 0 and undisturbed.manager_stores >= 50
    for store in range(undisturbed.manager_stores):
        assert run(replace(schedule, manager_deaths=frozenset((store,)))).manager_deaths == 1
    print(f"{schedule}: manager killed at each of {undisturbed.manager_stores} stores")


@pytest.mark.parametrize("schedule", SHORT, ids=lambda schedule: f"seed{schedule.seed}")
def test_executor_killed_before_every_store(schedule: Schedule) -> None:
    undisturbed = run(schedule)
    assert undisturbed.executor_stores >= 50
    for store in range(undisturbed.executor_stores):
        assert run(replace(schedule, executor_deaths=frozenset((store,)))).executor_deaths == 1
    print(f"{schedule}: executor killed at each of {undisturbed.executor_stores} stores")


def random_schedule(seed: int) -> Schedule:
    rng = random.Random(f"deaths {seed}")

    def deaths(most: int) -> frozenset[int]:
        return frozenset(rng.randrange(600) for _ in range(rng.randint(0, most)))

    return Schedule(
        seed,
        requests=rng.randint(4, 9),
        pages=rng.randint(8, 24),
        rows=rng.randint(2, 6),
        manager_deaths=deaths(12),
        executor_deaths=deaths(6),
    )


def test_random_deaths() -> None:
    outcomes: list[Outcome] = [run(random_schedule(seed)) for seed in range(500)]
    manager, executor = sum(o.manager_deaths for o in outcomes), sum(o.executor_deaths for o in outcomes)
    lost, hits = sum(o.lost_answers for o in outcomes), sum(o.hit_tokens for o in outcomes)
    deaths = f"{manager} manager deaths, {executor} executor deaths"
    print(f"{len(outcomes)} schedules, {deaths}, {lost} lost answers, {hits=}")
    assert manager > 500 and executor > 250 and lost > 500 and hits > 2000


def test_replays_exactly() -> None:
    assert run(random_schedule(5)) == run(random_schedule(5))
