"""Every store of short lives is a place to die. Random lives: test_campaign.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.faults.simulator.stores.schedule import Schedule, run

SHORT = (Schedule(3, requests=3), Schedule(8, requests=3), Schedule(21, requests=4, pages=9))


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
