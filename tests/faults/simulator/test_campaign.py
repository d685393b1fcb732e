"""Many seeds, on all cores. `scripts/simulate` plays more of them, or one again, event by event."""

from __future__ import annotations

import pytest

from tests.faults.simulator.campaign import OPERATIONS_A_SEED, Level, Report, play, play_all, play_range
from tests.faults.simulator.faults import Violation
from tests.faults.simulator.messages import components
from tests.faults.simulator.messages import schedule as messages

_OPERATIONS = 100_000  # a million: `scripts/simulate --operations 1000000`


def check(report: Report) -> None:
    print(report)
    assert not report.failures, "\n".join(map(str, report.failures[:3]))


@pytest.mark.timeout(900)  # on one core that others use as well
def test_ten_thousand_schedules_with_deaths() -> None:
    stores, messages = play_all({Level.STORES: range(9_400), Level.MESSAGES: range(600)})
    check(stores)
    check(messages)
    counts = stores.counts
    assert counts["manager_deaths"] > 25_000 and counts["executor_deaths"] > 10_000
    assert counts["broken_streams"] > 25_000 and counts["copied_tokens"] > 10_000 and counts["forks"] > 5_000
    assert counts["pins"] > 1_000 and counts["preemptions"] > 10_000 and counts["cancels"] > 1_000
    counts = messages.counts
    deaths = ("manager_deaths", "executor_deaths", "frontend_deaths", "client_deaths")
    assert all(counts[name] > 300 for name in deaths) and counts["broken_streams"] > 500
    assert counts["lost_messages"] > 1_000 and counts["tokens"] > 10_000 and counts["preemptions"] > 50


@pytest.mark.timeout(900)
def test_random_operations() -> None:
    (report,) = play_all({Level.OPERATIONS: range(_OPERATIONS // OPERATIONS_A_SEED)})
    check(report)
    counts = report.counts
    assert counts["operations"] == _OPERATIONS
    # There was something to check.
    assert counts["live_rows"] > _OPERATIONS
    assert counts["forks"] > _OPERATIONS // 200 and counts["restarts"] > _OPERATIONS // 100


@pytest.mark.parametrize("level", Level)
def test_replays_exactly(level: Level) -> None:
    first, second = list[str](), list[str]()
    assert play(level, 5, first.append) == play(level, 5, second.append)
    assert first == second and len(first) > 5


def test_the_number_of_workers_changes_nothing() -> None:
    seeds = {Level.STORES: range(60), Level.MESSAGES: range(30)}
    reports = play_all(seeds, workers=2)
    assert reports == play_all(seeds, workers=1)
    assert [report.counts for report in reports] == [play_range(level, part).counts for level, part in seeds.items()]


def test_a_failure_names_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise Violation("as planned")

    monkeypatch.setattr(components.ModelRunner, "collect", fail)
    (failure, *_) = play_range(Level.MESSAGES, range(3)).failures
    assert "as planned" in str(failure) and f"--level 2 --seed {failure.seed} --trace" in str(failure)
    with pytest.raises(Violation, match="as planned"):
        messages.run(messages.Schedule.drawn(failure.seed))
