"""The check between calls: only when nothing happens, in slices, void after a change, and with the right remedy."""

from __future__ import annotations

import pytest

from kvmanager.core import ManagerCore
from kvmanager.idle import QUIET_SECONDS, IdleCheck
from kvmanager.stored import STEP_PAGES
from tests.unit.kvmanager.bench import Bench


class Daemon:
    """A bench, a check, and a clock of which each look takes some time."""

    def __init__(self, pages: int = 20, tick: float = 0.0) -> None:
        self.bench = Bench(pages=pages)
        self.bench.fill("a", list(range(12)))
        self.now = 1000.0
        self.tick = tick
        self.calls = 0
        self.check = IdleCheck(lambda: self.core, lambda: self.calls, self._clock)
        self.check.work()

    @property
    def core(self) -> ManagerCore | None:
        return self.bench.core

    def _clock(self) -> float:
        self.now += self.tick
        return self.now

    def rest(self, seconds: float = QUIET_SECONDS) -> None:
        self.now += seconds
        self.check.work()


def derived_damage(daemon: Daemon) -> None:
    daemon.bench.core.pages.free.pop()


def stored_damage(daemon: Daemon) -> None:
    daemon.bench.tables.page_tokens[daemon.bench.core.pages.eviction_order()[0], 1] += 1


def test_derived_state_that_is_wrong_is_derived_anew(capsys: pytest.CaptureFixture[str]) -> None:
    daemon = Daemon()
    derived_damage(daemon)
    daemon.rest()
    assert daemon.check.findings > 0 and daemon.bench.core.check_integrity() == []
    assert "derived anew" in capsys.readouterr().out


def test_stored_words_that_are_wrong_are_left_and_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    daemon = Daemon()
    stored_damage(daemon)
    before = bytes(daemon.bench.tables._buffer)
    daemon.rest()
    assert daemon.check.findings == 1 and bytes(daemon.bench.tables._buffer) == before
    assert "run pagehold fsck" in capsys.readouterr().out
    daemon.calls += 1
    daemon.check.work()
    daemon.rest(100)
    assert daemon.check.findings == 1 and not capsys.readouterr().out


def test_nothing_is_derived_from_tables_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = Daemon()
    rebuilt: list[int] = []
    monkeypatch.setattr(daemon.bench.core, "rebuild", lambda: rebuilt.append(1))
    derived_damage(daemon)
    daemon.rest()
    assert rebuilt == [1]
    stored_damage(daemon)
    daemon.calls += 1
    daemon.check.work()
    daemon.rest(100)
    assert rebuilt == [1] and daemon.check.findings > 1


def test_it_waits_until_nothing_has_happened_for_a_while() -> None:
    daemon = Daemon()
    derived_damage(daemon)
    for _ in range(10):
        daemon.calls += 1
        daemon.check.work()
        daemon.rest(QUIET_SECONDS * 0.9)
    assert not daemon.check.findings
    daemon.rest(QUIET_SECONDS * 0.2)
    assert daemon.check.findings


def test_once_in_a_quiet_time_and_seldom() -> None:
    daemon = Daemon()
    daemon.rest()
    derived_damage(daemon)
    daemon.rest(1000)
    assert not daemon.check.findings, "nothing has happened since the last check"
    daemon.now -= 990
    daemon.calls += 1
    daemon.check.work()
    daemon.rest(20)
    assert not daemon.check.findings, "the last check was a moment ago"
    daemon.rest(60)
    assert daemon.check.findings


def test_it_works_in_slices_and_begins_anew_after_a_change() -> None:
    daemon = Daemon(pages=8 * STEP_PAGES, tick=0.0015)
    daemon.now += QUIET_SECONDS
    slices = 0
    while daemon.check.work() < 0.1:
        slices += 1
    assert slices > 5
    daemon.calls += 1
    daemon.now += 100
    daemon.check.work()
    daemon.now += QUIET_SECONDS
    assert daemon.check.work() < 0.1
    # Rows come and go between slices: what was seen before is no finding.
    key = daemon.bench.open("b", list(range(9)))
    daemon.bench.ensure(key, 9)
    daemon.calls += 1
    daemon.now += QUIET_SECONDS
    assert daemon.check.work() > 0.1
    daemon.now += QUIET_SECONDS
    while daemon.check.work() < 0.1:
        pass
    assert not daemon.check.findings


def test_rows_that_go_away_by_themselves_are_a_change() -> None:
    daemon = Daemon(pages=8 * STEP_PAGES, tick=0.0015)
    key = daemon.bench.open("b", list(range(9)))
    daemon.bench.ensure(key, 9)
    daemon.check.work()
    daemon.now += QUIET_SECONDS
    assert daemon.check.work() < 0.1
    daemon.bench.core.close_all(key)
    while daemon.check.work() < 0.1:
        pass
    daemon.now += QUIET_SECONDS
    while daemon.check.work() < 0.1:
        pass
    assert not daemon.check.findings
